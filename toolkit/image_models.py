"""Image classifiers: new ones of any size, and those that are there; and what each of them reads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ViTConfig, ViTForImageClassification
from transformers.image_processing_base import ImageProcessingMixin

from toolkit.config import ImageModelConfig
from toolkit.data.images import ImageProcessor, read_processor
from toolkit.errors import ConfigError, ModelError
from toolkit.models import (
    Origin,
    first_line,
    freeze,
    load_pretrained_image_classifier,
    set_dropout,
    source_of,
    unreadable,
)
from toolkit.networks.image_cnn import GROUPS, ImageCnnConfig, ImageCnnForImageClassification
from toolkit.networks.image_mlp import ImageMlpConfig, ImageMlpForImageClassification
from toolkit.sharing import once_a_node

_SIDE = 28
_READ_BY = {
    "mlp": frozenset({"sizes"}),
    "cnn": frozenset({"sizes"}),
    "vit": frozenset({"patch_size", "layers", "hidden_size", "heads", "attention"}),
    "": frozenset({"attention", "revision", "init"}),
}
"""Settings that only some networks read; the last are weights that are there."""


def image_input(config: ImageModelConfig) -> ImageProcessor:
    """What the network reads; a new one leaves it to the data whether grey or coloured, and by which statistics.

    Raises:
        ConfigError: settings that have no effect on this network.
        ModelError: the model is not there, or reads what cannot be prepared here.
    """
    _check(config)
    if config.name is None:
        return ImageProcessor(config.image_size or _SIDE)
    source, options = source_of(config)
    try:
        network = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # whatever goes wrong in there, the user is to hear of which model
        raise unreadable(config, "configuration", error) from error
    try:
        content, _ = ImageProcessingMixin.get_image_processor_dict(source, **options)
        found = read_processor(content, f"the processor of --model.name {config.name}")
    except OSError:  # it has none: then the data's statistics will do
        side = getattr(network, "image_size", _SIDE)
        found = ImageProcessor(
            side[0] if isinstance(side, (list, tuple)) else side, getattr(network, "num_channels", 3)
        )
    size = config.image_size
    if size is None or size == found.size:
        return found
    edge = None if found.edge is None else round(found.edge * size / found.size)
    return dataclasses.replace(found, size=size, edge=edge)


def load_image_classifier(
    config: ImageModelConfig, labels: Sequence[str], processor: ImageProcessor, *, seed: int
) -> nn.Module:
    """An image classifier with one output for each label, in fp32 on the CPU.

    What is new of it is drawn from `seed`, so that all ranks hold the same. A head for another number of labels, from
    an earlier training, is replaced.

    Raises:
        ModelError: the model is not there or cannot classify.
        ConfigError: sizes that do not go together, or `freeze` matches nothing, or everything.
    """
    if config.name is None:
        what = repr((config, list(labels), processor.channels, seed))
        return once_a_node(what, functools.partial(_new, config, labels, processor, seed=seed))
    sizes = {} if config.image_size is None else {"image_size": config.image_size}
    model: Any = load_pretrained_image_classifier(config, labels, sizes, seed=seed)
    reads = getattr(model.config, "num_channels", processor.channels)
    if reads != processor.channels:
        raise ModelError(
            f"--model.name {config.name} reads {reads} channels, and its processor prepares {processor.channels}",
            "Mend its preprocessor_config.json.",
        )
    return model  # type: ignore[no-any-return]


def _new(config: ImageModelConfig, labels: Sequence[str], processor: ImageProcessor, *, seed: int) -> nn.Module:
    classes = dict(enumerate(labels))
    common: dict[str, Any] = {
        "image_size": processor.size,
        "num_channels": processor.channels,
        "id2label": classes,
        "label2id": {label: index for index, label in classes.items()},
    }
    network, kind = _NEW[config.network](config, common)
    network.dtype = torch.float32
    if config.dropout is not None:
        set_dropout(network, config.dropout)
    torch.manual_seed(seed)
    try:
        model: Any = kind._from_config(network, dtype=torch.float32, attn_implementation=config.attention)
    except (ImportError, ValueError) as error:
        raise ModelError(f"this network cannot be built: {first_line(error)}", "Change --model.*.") from error
    model.origin = Origin("", None, "random", ())
    freeze(model, config.freeze)
    return model  # type: ignore[no-any-return]


def _mlp(config: ImageModelConfig, common: dict[str, Any]) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    sizes: dict[str, Any] = {"hidden_sizes": config.sizes} if config.sizes else {}
    return ImageMlpConfig(**sizes, **common), ImageMlpForImageClassification


def _cnn(config: ImageModelConfig, common: dict[str, Any]) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    sizes: dict[str, Any] = {"channels": config.sizes} if config.sizes else {}
    network = ImageCnnConfig(**sizes, **common)
    if any(channels % GROUPS for channels in network.channels):
        raise ConfigError(
            f"--model.sizes {' '.join(map(str, network.channels))}: channels are normed in {GROUPS} groups",
            f"Use multiples of {GROUPS}.",
        )
    if network.image_size < 2 ** len(network.channels):
        raise ConfigError(
            f"images of {network.image_size} pixels cannot be halved {len(network.channels)} times",
            "Use fewer stages (--model.sizes) or a larger --model.image_size.",
        )
    return network, ImageCnnForImageClassification


def _vit(config: ImageModelConfig, common: dict[str, Any]) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    width, heads, patch = config.hidden_size or 128, config.heads or 4, config.patch_size or 4
    if width % heads:
        raise ConfigError(
            f"--model.hidden_size {width} is no multiple of --model.heads {heads}", "Choose them so that it is."
        )
    if common["image_size"] % patch:
        raise ConfigError(
            f"images of {common['image_size']} pixels cannot be cut into squares of {patch}",
            "Choose --model.patch_size and --model.image_size so that they can.",
        )
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": config.layers or 4}
    return ViTConfig(**sizes, intermediate_size=4 * width, patch_size=patch, **common), ViTForImageClassification


_NEW = {"mlp": _mlp, "cnn": _cnn, "vit": _vit}


def _check(config: ImageModelConfig) -> None:
    """Refuse what has no effect on this network."""
    kind, unset = "" if config.name is not None else config.network, ImageModelConfig()
    for key in sorted(frozenset.union(*_READ_BY.values()) - _READ_BY[kind]):
        if getattr(config, key) != getattr(unset, key):
            what = f"a new {kind}" if kind else f"the weights of --model.name {config.name}, whose sizes are their own"
            raise ConfigError(f"--model.{key} has no effect on {what}", "Drop it.")
    if kind == "" and config.network != unset.network:
        raise ConfigError(
            f"--model.network {config.network} has no effect beside --model.name {config.name}", "Drop one of the two."
        )
