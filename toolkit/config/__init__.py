"""Settings: frozen dataclasses, filled from a YAML file and then from the command line.

`parse(Config)` is the only entrance. The order of precedence is: default of the dataclass, then the file
named by `--config`, then the command line. An unknown key, a wrong type or a value out of range is a
`ConfigError` that names the key, in whichever of the two it stands.
"""

from toolkit.config.annotations import SpansConfig, TagsConfig
from toolkit.config.augment import TextAugmentConfig
from toolkit.config.contrast import AnchorsConfig, ContrastConfig
from toolkit.config.embeddings import MatrixConfig, VectorsConfig, VocabularyConfig, WordModelConfig
from toolkit.config.images import AugmentConfig, ImageDataConfig, ImageModelConfig
from toolkit.config.parsing import from_yaml, parse, plain, to_yaml, validate
from toolkit.config.sections import (
    AdapterConfig,
    ChatConfig,
    CheckpointConfig,
    CorpusConfig,
    DecoderConfig,
    GenerateConfig,
    ModelConfig,
    Normalisation,
    OptimConfig,
    PairsConfig,
    Precision,
    PreferenceConfig,
    Quantization,
    RecipeConfig,
    RunConfig,
    SourcesConfig,
    StrategyConfig,
    TextDataConfig,
    TokenizerConfig,
    TrainConfig,
)
from toolkit.config.seq2seq import DecodeConfig, EncoderDecoderConfig, SummaryConfig, TextPairsConfig, TranslationConfig
from toolkit.config.speech import SpeechConfig
from toolkit.config.tables import EventsConfig, NextItemNetworkConfig, TableConfig, TableNetworkConfig

__all__ = [
    "AdapterConfig",
    "AnchorsConfig",
    "AugmentConfig",
    "ChatConfig",
    "CheckpointConfig",
    "ContrastConfig",
    "CorpusConfig",
    "DecodeConfig",
    "DecoderConfig",
    "EncoderDecoderConfig",
    "EventsConfig",
    "GenerateConfig",
    "ImageDataConfig",
    "ImageModelConfig",
    "MatrixConfig",
    "ModelConfig",
    "NextItemNetworkConfig",
    "Normalisation",
    "OptimConfig",
    "PairsConfig",
    "Precision",
    "PreferenceConfig",
    "Quantization",
    "RecipeConfig",
    "RunConfig",
    "SourcesConfig",
    "SpansConfig",
    "SpeechConfig",
    "StrategyConfig",
    "SummaryConfig",
    "TableConfig",
    "TableNetworkConfig",
    "TagsConfig",
    "TextAugmentConfig",
    "TextDataConfig",
    "TextPairsConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TranslationConfig",
    "VectorsConfig",
    "VocabularyConfig",
    "WordModelConfig",
    "from_yaml",
    "parse",
    "plain",
    "to_yaml",
    "validate",
]
