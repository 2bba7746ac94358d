"""What is done to a network before it is laid over the ranks, in the order in which it must be."""

from __future__ import annotations

from typing import Any

import torch

from toolkit.compute.compiled import compile_blocks
from toolkit.compute.dropout import replace_dropout
from toolkit.compute.fp8 import multiply_in_fp8
from toolkit.compute.recompute import checkpoint_activations
from toolkit.config import TrainConfig


def make_ready(model: Any, train: TrainConfig, precision: str, device: torch.device) -> dict[str, str]:
    """Let a model compute as these settings say; returns what the plan tells of it.

    Args:
        model: without padding, if it is to be, and with norms that keep less.
        train: what is asked for.
        precision: of forward and backward.
        device: where it is to be laid.

    Raises:
        ConfigError: it has no blocks whose activations could be computed again.
    """
    rows = {}
    if device.type == "cpu":
        replace_dropout(model)
    if precision == "fp8":
        emulated = ", emulated on CPUs" if device.type == "cpu" else ""
        rows["fp8"] = f"products of {multiply_in_fp8(model, device)} linear layers, all else in bf16{emulated}"
    if train.compile:
        rows["compiled"] = f"{compile_blocks(model, device)} blocks; the first steps wait for it"
    if (kind := train.activation_checkpointing) != "none":
        blocks = checkpoint_activations(model, kind)
        rows["activations"] = f"computed again in backward, in {blocks} blocks ({kind})"
    return rows
