"""Settings: frozen dataclasses, filled from a YAML file and then from the command line.

`parse(Config)` is the only entrance. The order of precedence is: default of the dataclass, then the file
named by `--config`, then the command line. An unknown key, a wrong type or a value out of range is a
`ConfigError` that names the key, in whichever of the two it stands.
"""

from toolkit.config.contrast import ContrastConfig, TextPairsConfig
from toolkit.config.embeddings import MatrixConfig, VectorsConfig, VocabularyConfig, WordModelConfig
from toolkit.config.parsing import from_yaml, parse, plain, to_yaml, validate
from toolkit.config.sections import (
    AdapterConfig,
    ChatConfig,
    CheckpointConfig,
    CorpusConfig,
    DecoderConfig,
    GenerateConfig,
    ModelConfig,
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

__all__ = [
    "AdapterConfig",
    "ChatConfig",
    "CheckpointConfig",
    "ContrastConfig",
    "CorpusConfig",
    "DecoderConfig",
    "GenerateConfig",
    "MatrixConfig",
    "ModelConfig",
    "OptimConfig",
    "PairsConfig",
    "Precision",
    "PreferenceConfig",
    "Quantization",
    "RecipeConfig",
    "RunConfig",
    "SourcesConfig",
    "StrategyConfig",
    "TextDataConfig",
    "TextPairsConfig",
    "TokenizerConfig",
    "TrainConfig",
    "VectorsConfig",
    "VocabularyConfig",
    "WordModelConfig",
    "from_yaml",
    "parse",
    "plain",
    "to_yaml",
    "validate",
]
