"""Networks that transformers does not have, in its form: a configuration, and a `PreTrainedModel` that reads it.

So they are saved, loaded, exported and laid over processes like any other. A network is one file here, whose classes
stand in `NETWORKS`; `config.json` names the class, and `AutoConfig` knows the configuration by its `model_type`.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from toolkit.networks.bag_of_words import BagOfWordsForSequenceClassification
from toolkit.networks.efficientnet_lite import EfficientNetLiteForImageClassification
from toolkit.networks.image_cnn import ImageCnnForImageClassification
from toolkit.networks.image_mlp import ImageMlpForImageClassification
from toolkit.networks.next_item import GPT2ForNextItem
from toolkit.networks.tables import FTTransformerForTables, MlpForTables

NETWORKS: tuple[type[PreTrainedModel], ...] = (
    BagOfWordsForSequenceClassification,
    EfficientNetLiteForImageClassification,
    FTTransformerForTables,
    GPT2ForNextItem,
    ImageCnnForImageClassification,
    ImageMlpForImageClassification,
    MlpForTables,
)
"""All of them."""

for _network in NETWORKS:
    AutoConfig.register(_network.config_class.model_type, _network.config_class)
    if _network.__name__.endswith("ForImageClassification"):
        AutoModelForImageClassification.register(_network.config_class, _network)
    if _network.__name__.endswith("ForSequenceClassification"):
        AutoModelForSequenceClassification.register(_network.config_class, _network)


def architecture(name: str) -> Any:
    """The class that a `config.json` names: one of these, or of transformers; None where neither has it."""
    own = {network.__name__: network for network in NETWORKS}
    return own.get(name) or getattr(transformers, name, None)
