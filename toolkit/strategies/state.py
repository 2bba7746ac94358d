"""Training state in a layout that no strategy owns: contiguous ranges of flattened tensors.

Whatever a strategy does with a tensor (keep it whole, shard its rows, cut a flat partition through it), the part that
one rank holds is a range of the flattened tensor. Ranges can be written by one strategy and read by another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.low_bit_optim import LowBitAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each element of a parameter."""


@dataclass(frozen=True)
class FlatShard:
    """The range of one flattened tensor that this rank holds.

    Attributes:
        data: 1-D view into the engine's own memory: what is copied into it is in force.
        start: index of its first element in the flattened tensor.
        shape: of the whole tensor.
        apart: whether `data` is a copy of what the engine holds in another form, on the CPU; what is copied into it is
            in force when `Strategy.loaded` has been called.
    """

    data: torch.Tensor
    start: int
    shape: tuple[int, ...]
    apart: bool = False

    @property
    def total(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


def whole(tensor: torch.Tensor) -> FlatShard:
    """A tensor that this rank holds whole; it must be contiguous."""
    return FlatShard(tensor.detach().view(-1), 0, tuple(tensor.shape))


def adam_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, group: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The optimizer's state of `parameter`, made as torch's AdamW makes it where no step has been taken yet.

    Of moments that the optimizer holds in another form it has flat copies: see `held_apart`. `group` is the one of the
    optimizer that the parameter belongs to, also where an engine has taken it out of there.
    """
    if isinstance(optimizer, LowBitAdamW):
        return optimizer.copied(parameter, group["bits"])
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        # The count is fp32 and, for the fused kernels, on the parameter's device.
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
    return state


def held_apart(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the moments that `adam_state` gives are copies, which `put_back` takes."""
    return isinstance(optimizer, LowBitAdamW)


def put_back(optimizer: torch.optim.Optimizer) -> None:
    """The state that `adam_state` gave has been filled: bring it into force."""
    if isinstance(optimizer, LowBitAdamW):
        optimizer.put_back()
