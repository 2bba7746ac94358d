"""Training state in a layout that no strategy owns: contiguous ranges of flattened tensors.

Whatever a strategy does with a tensor (keep it whole, shard its rows, cut a flat partition through it), the part that
one rank holds is a range of the flattened tensor. Ranges can be written by one strategy and read by another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each element of a parameter."""


@dataclass(frozen=True)
class FlatShard:
    """The range of one flattened tensor that this rank holds.

    Attributes:
        data: 1-D view into the engine's own memory: what is copied into it is in force.
        start: index of its first element in the flattened tensor.
        shape: of the whole tensor.
    """

    data: torch.Tensor
    start: int
    shape: tuple[int, ...]

    @property
    def total(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


def whole(tensor: torch.Tensor) -> FlatShard:
    """A tensor that this rank holds whole; it must be contiguous."""
    return FlatShard(tensor.detach().view(-1), 0, tuple(tensor.shape))


def adam_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The optimizer's state of `parameter`, made as torch's AdamW makes it where no step has been taken yet."""
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        # The count is fp32 and, for the fused kernels, on the parameter's device.
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
    return state
