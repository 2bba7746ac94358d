"""Data parallel: every rank holds the whole model; gradients are averaged."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from toolkit.strategies import compression
from toolkit.strategies.base import Layout, TorchStrategy

# No buffer here changes in training, so sending them before each forward would be waste. torch 2.13 renamed the option.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)


class DDP(TorchStrategy):
    """torch's DistributedDataParallel."""

    layouts: ClassVar[Mapping[str, tuple[Layout, ...]]] = {"ddp": (Layout(2), Layout(3))}
    options: ClassVar[frozenset[str]] = frozenset({"compress", "compress_rank", "compress_start"})

    model: DistributedDataParallel
    _settled = False

    def check(self) -> None:
        """Refuse one process, and settings of a compression that is not in force."""
        super().check()
        self.require_ranks("average gradients with")
        compression.check_compression(self.config, self.precision.name)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Gradients live in the buckets that are reduced, so they are not copied."""
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        options: dict[str, Any] = {"device_ids": devices, "gradient_as_bucket_view": True, _SYNC_BUFFERS: False}
        wrapped = DistributedDataParallel(model.to(self.world.device), **options)
        compression.compress(wrapped, self.config)
        return wrapped

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """The first one in training is done twice."""
        if not self._settled and torch.is_grad_enabled():
            self._settled = True
            self._settle(inputs)
        return super().forward(inputs)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Reduce once a step."""
        return contextlib.nullcontext() if last else self.model.no_sync()

    def _settle(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Let torch deal the parameters to buckets by the order in which their gradients come.

        It does so once, after the first backward; and where in its bucket a gradient lies decides in which order three
        or more ranks add it up. A run that goes on would add its first step in another order than the run that was
        never interrupted. So this one counts for nothing.
        """
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        synchronizing, self.model.require_backward_grad_sync = self.model.require_backward_grad_sync, True
        with torch.random.fork_rng(devices):
            outputs = super().forward(inputs)
            learnt = [value for value in outputs.values() if getattr(value, "requires_grad", False)]  # no cache
            super().backward(sum(value.float().sum() for value in learnt))
        self.model.require_backward_grad_sync = synchronizing
        self.discard()
        compression.forget(self.model)

    def loaded(self) -> None:
        """The error that PowerSGD feeds back is of other steps, and not finite where they were left for that."""
        super().loaded()
        compression.forget(self.model)

    @property
    def module(self) -> nn.Module:
        """What DDP wraps."""
        module: nn.Module = self.model.module
        return module

    def effective(self) -> dict[str, Any]:
        """With what DDP itself says of its group and its hook."""
        group = self.model.process_group
        reduced = {"reduced_over_ranks": group.size(), "backend": group.name()}
        return super().effective() | reduced | compression.effective(self.model)
