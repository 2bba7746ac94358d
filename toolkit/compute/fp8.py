"""Products in 8-bit floating point (fp8) over torchao: those of the linear layers in a network's repeated blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from toolkit.errors import ConfigError
from toolkit.models import repeated_blocks

_MULTIPLE = 16
"""Of which both sides of a weight must be, or the hardware does not multiply it in fp8."""


def check_fp8(strategy: str, adapter: str) -> None:
    """Raises ConfigError where fp8 would gain nothing, or cost what a strategy saves."""
    if adapter != "none":
        raise ConfigError(
            f"--precision fp8 has no effect with --adapter.name {adapter}: weights that are frozen are not multiplied "
            "in fp8, and those of adapters are too narrow to gain from it",
            "Use --precision bf16.",
        )
    if strategy == "zero3":
        raise ConfigError(
            "--precision fp8 with zero3 is refused: layers in fp8 hold what ZeRO-3 has gathered until backward, so "
            "that each process would hold the whole model",
            "Use --strategy.name fsdp, or --precision bf16.",
        )


def multiply_in_fp8(model: nn.Module, device: torch.device) -> int:
    """Let the linear layers of the model's repeated blocks multiply in fp8; returns how many of them do.

    The inputs, and what comes back to them in backward, are rounded token by token, each token with a scale of its own;
    weights output by output, or as a whole. The gradient of a weight is a product in the precision around it. So a
    token's numbers do not depend on those that lie beside it in a batch, as they would with one scale for all tokens
    (torchao's recipe `rowwise_with_gw_hp`; Micikevicius et al. 2022 for the formats). Parameters stay what they are.
    Layers of which a side is no multiple of 16, and what is frozen, stay as they are too.

    Args:
        model: not yet laid over the ranks; it is changed.
        device: that it will compute on. Where that is a CPU, fp8 is emulated: the numbers, without the speed.

    Raises:
        ConfigError: torchao is missing, or there is no such layer.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError(
            f"--precision fp8 needs torchao, which cannot be imported: {error}",
            "Install it (`pip install -c constraints.txt -e '.[fp8]'`), or use --precision bf16.",
        ) from error
    recipe: Any = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    config = dataclasses.replace(recipe, emulate=device.type == "cpu")
    layers = {module for block in repeated_blocks(model) for module in block.modules() if _fits(module)}
    if not layers:
        raise ConfigError(
            "--precision fp8 has no effect on this model: its blocks have no linear layers that are trained and whose "
            f"sides are multiples of {_MULTIPLE}",
            "Use --precision bf16.",
        )
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: module in layers)
    return len(layers)


def _fits(module: nn.Module) -> bool:
    # Subclasses do more than their forward says, as torch's attention does with its projection's weight.
    if type(module) is not nn.Linear or not module.weight.requires_grad:
        return False
    return all(side % _MULTIPLE == 0 for side in module.weight.shape)
