"""Activation checkpointing: what a block has computed is computed again in backward, and not kept until then."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from toolkit.errors import ConfigError
from toolkit.models import repeated_blocks

_KEPT = (
    *("mm", "addmm", "_scaled_mm"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
)
"""Operators whose results `selective` keeps: products with weights, which take most of a forward's time, and attention
where it is one operator. Not the batched products of attention on a CPU, which are large and go on in place."""


Kind = Literal["none", "selective", "full", "offload"]


def check_checkpointing(kind: Kind, compiled: bool, strategy: str, device: torch.device) -> None:
    """Raises ConfigError where a kind would have no effect, or not the one that is meant.

    `selective` must see the operators that it is to select from, and no others; `offload` needs somewhere to go.
    """
    if kind == "offload" and device.type == "cpu":
        raise ConfigError(
            "--train.activation_checkpointing offload has no effect on CPU ranks, whose memory it would move to",
            "Use full.",
        )
    key = "--train.activation_checkpointing selective"
    if kind == "selective" and compiled:
        raise ConfigError(f"{key} does not see into what --train.compile compiles", "Use full, or drop one of the two.")
    if kind == "selective" and strategy == "zero3":
        raise ConfigError(
            f"{key} takes for the model's the operators with which ZeRO-3 gathers weights inside of each block",
            "Use full, or --strategy.name zero2 or fsdp.",
        )


def checkpoint_activations(model: nn.Module, kind: Kind) -> int:
    """Let each of the model's repeated blocks keep its inputs, or little more; returns how many blocks there are.

    Numbers do not change, dropout included: a block draws in backward what it drew in forward (Chen et al. 2016). While
    there is nothing to be kept, as in evaluation, nothing else is done.

    Args:
        model: not yet laid over the ranks.
        kind: `full` keeps a block's inputs, and computes all of its forward again; `selective` keeps the results of
            products with weights too, and computes again what is cheap (Korthikanti et al. 2022); `offload` is `full`
            with the inputs in the host's memory until backward asks for them.

    Raises:
        ConfigError: the model has no repeated blocks.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise ConfigError(
            "--train.activation_checkpointing has no effect on this model: it has no repeated blocks", "Drop it."
        )
    if "use_cache" in inspect.signature(model.forward).parameters:
        model.register_forward_pre_hook(_without_cache, with_kwargs=True)
    contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _policy)}
    for block in blocks:
        # Not the module, whose hooks gather its weights once for the forward, and once for the backward with all in it.
        block.forward = _again(block.forward, contexts if kind == "selective" else {}, offload=kind == "offload")
    return len(blocks)


def _again(forward: Callable[..., Any], options: dict[str, Any], *, offload: bool) -> Callable[..., Any]:
    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # What a block keeps, its inputs, is what autograd saves outside of the checkpoint.
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else contextlib.nullcontext():
            return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return checkpointed


def _without_cache(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Keys and values of all blocks would be kept, and grow when they are computed again."""
    return (args, kwargs | {"use_cache": False}) if torch.is_grad_enabled() else None


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator.namespace == "aten" and operator._opname in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
