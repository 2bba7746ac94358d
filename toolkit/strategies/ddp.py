"""Data parallel: every rank holds the whole model; gradients are averaged."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

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

    model: DistributedDataParallel

    def check(self) -> None:
        """Refuse one process."""
        super().check()
        self.require_ranks("average gradients with")

    def wrap(self, model: nn.Module) -> nn.Module:
        """Gradients live in the buckets that are reduced, so they are not copied."""
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        options: dict[str, Any] = {"device_ids": devices, "gradient_as_bucket_view": True, _SYNC_BUFFERS: False}
        return DistributedDataParallel(model, **options)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Reduce once a step."""
        return contextlib.nullcontext() if last else self.model.no_sync()

    @property
    def module(self) -> nn.Module:
        """What DDP wraps."""
        module: nn.Module = self.model.module
        return module

    def effective(self) -> dict[str, Any]:
        """With what DDP itself says of its group."""
        group = self.model.process_group
        return super().effective() | {"reduced_over_ranks": group.size(), "backend": group.name()}
