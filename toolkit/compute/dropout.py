"""Dropout at a fraction of torch's cost on a CPU.

There torch draws one number for each element, one after the other: 5 ns an element, more than the matrix products of
a small encoder take. Here 16 bits decide for each element, four elements to a draw, from a generator that is seeded
by torch's, so that what seeds torch (a step, a checkpoint, recomputation) seeds this too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from toolkit.profiler import span

LANES = 2**16
"""What is dropped is a multiple of 1 / LANES of all; what is kept is scaled by that very share: nothing is biased."""


def replace_dropout(model: nn.Module) -> int:
    """Let the dropout layers of a model on the CPU draw quickly; returns how many there are."""
    layers = [module for module in model.modules() if type(module) is nn.Dropout]
    for layer in layers:
        layer.__class__ = QuickDropout
    return len(layers)


class QuickDropout(nn.Dropout):
    """`torch.nn.Dropout` with masks from `keep_mask`, not in place."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Any shape, on the CPU."""
        if not self.training or self.p == 0.0:
            return input
        return _Dropout.apply(input, self.p)  # type: ignore[no-any-return,no-untyped-call]


def keep_mask(shape: torch.Size, p: float, dtype: torch.dtype) -> torch.Tensor:
    """1 where an element is kept and 0 where, with probability `p`, it is dropped."""
    size = shape.numel()
    seed = int(torch.randint(2**62, ()))
    with span("compute"):  # which a trace of torch's operators would not show
        words: Any = np.random.SFC64(seed).random_raw(-(-size // 4))
    lanes = torch.from_numpy(words.view(np.int16))[:size]
    # Out of a comparison straight into numbers: one pass.
    kept = torch.empty(size, dtype=dtype)
    return torch.ge(lanes, round(p * LANES) - LANES // 2, out=kept).view(shape)


def kept_scale(p: float) -> float:
    """What is kept is multiplied by this, so that the mean stays."""
    dropped = round(p * LANES)
    return LANES / (LANES - dropped) if dropped < LANES else 0.0


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, p: float) -> torch.Tensor:
        kept = keep_mask(values.shape, p, values.dtype)
        ctx.save_for_backward(kept)
        ctx.scale = kept_scale(p)
        return _scaled(values, kept, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        return _scaled(gradient, kept, ctx.scale), None


def _scaled(values: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
    # bf16 has no room for the scale's digits: it is applied as a number, which torch keeps in fp32.
    return torch.mul(values, kept).mul_(scale)
