"""Steps that ranks take alone, and a meeting after so many: local SGD and DiLoCo, for links that are slow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from toolkit.errors import ConfigError
from toolkit.strategies.base import BuildOptimizer, Layout, TorchStrategy, Update
from toolkit.strategies.state import MOMENTS, FlatShard, adam_state, whole

_STEPS, _OUTER_LR, _OUTER_MOMENTUM = 20, 0.7, 0.9
_AT_ONCE = 2**24
"""Elements that are sent in one piece: enough for any link, little beside a model."""


class DiLoCo(TorchStrategy):
    """Each rank takes `local_steps` steps of AdamW on its own share of each batch; then the ranks meet.

    When they do, they average their weights. The way from the weights of the last meeting to that average is a
    gradient, which SGD with Nesterov's momentum applies to the weights of the last meeting (Douillard et al. 2023,
    algorithm 1). With `outer_lr` 1 and `outer_momentum` 0 that is the average itself: local SGD (Stich 2019). AdamW's
    moments are averaged too, so that after a meeting the ranks hold one state, which any number of them can go on with.
    """

    layouts: ClassVar[Mapping[str, tuple[Layout, ...]]] = {"diloco": ()}  # it does not promise the numbers of one rank
    options: ClassVar[frozenset[str]] = frozenset({"local_steps", "outer_lr", "outer_momentum"})

    def check(self) -> None:
        """Refuse one process, and fp16, whose loss scale all ranks must agree on after each step."""
        super().check()
        self.require_ranks("meet")
        if self.precision.name == "fp16":
            raise ConfigError(
                "--strategy.name diloco does not work with --precision fp16: each rank would skip other steps",
                "Use --precision bf16 or fp32.",
            )

    @property
    def local_steps(self) -> int:
        """Steps between two meetings."""
        return self.config.local_steps or _STEPS

    def wrap(self, model: nn.Module) -> nn.Module:
        """As it is."""
        return model.to(self.world.device)

    def setup(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Beside the optimizer there are the weights of the last meeting, and its momentum."""
        super().setup(model, build_optimizer)
        self._alone = 0
        self._met = [p.detach().clone() for p in self._parameters]
        self._momentum = [torch.zeros_like(weights) for weights in self._met]

    def update(self, learning_rate: float, grad_norm: float | None = None) -> Update:
        """A step alone, applied by all ranks or by none; the norm is the root of the mean square over the ranks."""
        update = super().update(learning_rate, grad_norm)
        self._alone += update.applied
        if self._alone == self.local_steps:
            self.synchronize()
        return replace(update, grad_norm=math.sqrt(float(self._mean_square)))

    @property
    def synchronized(self) -> bool:
        """Whether no step has been taken since the last meeting."""
        return self._alone == 0

    @torch.no_grad()
    def synchronize(self) -> None:
        """Meet now, if any step was taken alone."""
        if self.synchronized:
            return
        self._alone = 0
        weights = [p.detach() for p in self._parameters]
        self._average(weights)
        for moment in MOMENTS:
            groups = self.optimizer.param_groups
            self._average([adam_state(self.optimizer, p, group)[moment] for group in groups for p in group["params"]])
        way: Any = torch._foreach_sub(self._met, weights)
        momentum, rate = self._outer_momentum, self._outer_lr
        torch._foreach_mul_(self._momentum, momentum)
        torch._foreach_add_(self._momentum, way)
        torch._foreach_add_(way, self._momentum, alpha=momentum)
        torch._foreach_add_(self._met, way, alpha=-rate)
        torch._foreach_copy_(weights, self._met)
        self._weights_changed()

    def shards(self) -> dict[str, FlatShard]:
        """With the momentum of the meetings; to be saved after one."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        outer = {f"outer/{names[p]}": whole(m) for p, m in zip(self._parameters, self._momentum, strict=True)}
        return super().shards() | {name: shard for name, shard in outer.items() if shard.data.numel()}

    @torch.no_grad()
    def loaded(self) -> None:
        """What was saved was saved after a meeting."""
        super().loaded()
        self._alone = 0
        torch._foreach_copy_(self._met, [p.detach() for p in self._parameters])

    def effective(self) -> dict[str, Any]:
        """With what happens at a meeting."""
        outer = {"outer_lr": self._outer_lr, "outer_momentum": self._outer_momentum}
        return super().effective() | {"local_steps": self.local_steps} | outer

    def teardown(self) -> None:
        """Drop the weights of the last meeting too."""
        del self._met, self._momentum
        super().teardown()

    @property
    def _outer_lr(self) -> float:
        return _OUTER_LR if self.config.outer_lr is None else self.config.outer_lr

    @property
    def _outer_momentum(self) -> float:
        return _OUTER_MOMENTUM if self.config.outer_momentum is None else self.config.outer_momentum

    def _total_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """This rank's, by which it clips; not finite on all ranks where it is not on one."""
        own = super()._total_norm(gradients)
        self._mean_square = self.world.sum(own.double().square()) / self.world.size
        return own.where(self._mean_square.isfinite(), math.nan)

    def _average(self, tensors: Sequence[torch.Tensor]) -> None:
        for piece in _pieces(tensors):
            flat = torch.cat([tensor.flatten() for tensor in piece])
            dist.all_reduce(flat)
            flat /= self.world.size
            for tensor, part in zip(piece, torch.split(flat, [tensor.numel() for tensor in piece]), strict=True):
                tensor.copy_(part.view_as(tensor))


def _pieces(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of about `_AT_ONCE` elements together."""
    piece: list[torch.Tensor] = []
    for tensor in tensors:
        piece.append(tensor)
        if sum(map(torch.Tensor.numel, piece)) >= _AT_ONCE:
            yield piece
            piece = []
    if piece:
        yield piece
