"""Encoders of texts without a head, whose output is a vector for each token."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from toolkit.config import ModelConfig
from toolkit.errors import ModelError
from toolkit.folders import refuse_strays
from toolkit.models import Origin, freeze, set_dropout, source_of, unreadable
from toolkit.sharing import once_a_node


def load_encoder(config: ModelConfig, *, seed: int) -> nn.Module:
    """An encoder in fp32 on the CPU; with `init: random` it is drawn from `seed`, so that all ranks hold the same.

    Raises:
        ModelError: the model is not there, or is no encoder.
        ConfigError: `freeze` matches nothing, or everything.
    """
    return once_a_node(repr(("encoder", config, seed)), functools.partial(_load_encoder, config, seed=seed))


def drop_pooler(model: Any) -> Any:
    """The same without the layer over the first token, which some have: what asks for the tokens trains none of it."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _load_encoder(config: ModelConfig, *, seed: int) -> nn.Module:
    source, options = source_of(config)
    build: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": config.attention}
    missing: list[str] = []
    try:
        if Path(source).is_dir():
            refuse_strays(Path(source))
        network = AutoConfig.from_pretrained(source, **options)
        network.dtype = torch.float32
        if config.dropout is not None:
            set_dropout(network, config.dropout)
        torch.manual_seed(seed)
        if config.init == "random":
            model = AutoModel.from_config(network, **build)
        else:
            model, report = AutoModel.from_pretrained(
                source, config=network, output_loading_info=True, **options, **build
            )
            missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    except Exception as error:  # whatever goes wrong in there, the user is to hear of which model
        raise unreadable(config, "model", error) from error
    if missing:
        raise ModelError(
            f"the weights of --model.name {config.name} lack {len(missing)} tensors of the network in its config.json: "
            f"{', '.join(missing[:3])}, …",
            "Get the model again, or begin without its weights: --model.init random.",
        )
    drop_pooler(model)
    freeze(model, config.freeze)
    model.origin = Origin(config.name, config.revision, config.init, ())
    return model  # type: ignore[no-any-return]
