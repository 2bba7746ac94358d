"""Fully sharded data parallel (FSDP2): parameters, gradients and optimizer state in shards, as DTensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from toolkit.errors import ConfigError
from toolkit.models import repeated_blocks
from toolkit.quantization import describe_quantization
from toolkit.strategies.base import Layout, TorchStrategy
from toolkit.strategies.state import FlatShard, whole


class FSDP(TorchStrategy):
    """torch's `fully_shard`, block by block; over a 2-D mesh where `shard_size` is given (hybrid sharding)."""

    layouts: ClassVar[Mapping[str, tuple[Layout, ...]]] = {"fsdp": (Layout(2), Layout(4, {"shard_size": 2}))}
    options: ClassVar[frozenset[str]] = frozenset({"reshard_after_forward", "shard_size", "wrap", "offload"})

    casts = True

    model: FSDPModule  # type: ignore[assignment]

    def check(self) -> None:
        """Refuse one process (unless it offloads) and shards that do not divide the ranks."""
        super().check()
        if self.config.offload == "optimizer":
            raise ConfigError(
                "--strategy.offload optimizer has no effect under fsdp: a parameter and its moments stay together",
                "Use --strategy.offload parameters, or ZeRO.",
            )
        if self.config.offload in (None, "none"):
            self.require_ranks("share shards with")
        size = self.config.shard_size
        if size and (self.world.size % size or size == self.world.size):
            raise ConfigError(
                f"--strategy.shard_size {size} does not make hybrid shards of {self.world.size} ranks",
                "Use a divisor of the number of ranks that is smaller than it; leave it out to shard over all.",
            )

    def wrap(self, model: nn.Module) -> nn.Module:
        """Shard the repeated blocks one by one, then what is left at the root: no device holds more than one whole."""
        if describe_quantization(model):
            model.to(self.world.device)  # bitsandbytes moves more than its parameters
        if self.world.size == 1:
            self.world.form_group()
        options: dict[str, Any] = {"mesh": self._mesh(), "mp_policy": self._mixed_precision()}
        options["offload_policy"] = CPUOffloadPolicy() if self.config.offload == "parameters" else OffloadPolicy()
        if self.config.reshard_after_forward is not None:
            options["reshard_after_forward"] = self.config.reshard_after_forward
        for block in self._blocks(model):
            fully_shard(block, **options)
        fully_shard(model, **options)
        if hasattr(model, "generate"):  # which reads what is at the root before the first forward of the whole
            register_fsdp_forward_method(model, "generate")
        return model

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Reduce once a step."""
        self.model.set_requires_gradient_sync(last)
        yield

    def weights(self) -> dict[str, torch.Tensor]:
        """Gathered tensor by tensor to the CPU of rank 0."""
        if self.world.size == 1:
            return super().weights()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: dict[str, Any] = dict(get_model_state_dict(self.module, options=options))
        return self._to_save(state)

    def shards(self) -> dict[str, FlatShard]:
        """Out of the DTensors; an evaluation leaves the root's parameters gathered, for no backward follows it."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().shards()

    def effective(self) -> dict[str, Any]:
        """With the mesh and the share of the parameters that this rank holds, read from its DTensors."""
        shards = [p for p in self.module.parameters() if isinstance(p, DTensor)]
        mesh = shards[0].device_mesh
        policy = fully_shard.state(self.model)._mp_policy  # type: ignore[attr-defined]
        return super().effective() | {
            "mesh": list(mesh.shape),
            "placements": [str(placement) for placement in shards[0].placements],
            "sharded_parameters": len(shards),
            "units": sum(isinstance(module, FSDPModule) for module in self.module.modules()),
            "share_of_this_rank": sum(p.to_local().numel() for p in shards) / sum(p.numel() for p in shards),
            "gather_dtype": str(policy.param_dtype or shards[0].dtype).removeprefix("torch."),
            "reduce_dtype": str(policy.reduce_dtype or shards[0].dtype).removeprefix("torch."),
            "offload": self.config.offload or "none",
        }

    def _mesh(self) -> DeviceMesh:
        size, kind = self.config.shard_size, self.world.device.type
        if size is None:
            return init_device_mesh(kind, (self.world.size,), mesh_dim_names=("shard",))
        return init_device_mesh(kind, (self.world.size // size, size), mesh_dim_names=("replicate", "shard"))

    def _mixed_precision(self) -> MixedPrecisionPolicy:
        if not self.precision.reduced:
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=self.precision.dtype, reduce_dtype=torch.float32)

    def _blocks(self, model: nn.Module) -> list[nn.Module]:
        if not self.config.wrap:
            return repeated_blocks(model)
        blocks = [module for module in model.modules() if type(module).__name__ in self.config.wrap]
        missing = set(self.config.wrap) - {type(block).__name__ for block in blocks}
        if missing:
            there = sorted({type(module).__name__ for module in model.modules()})
            raise ConfigError(
                f"--strategy.wrap {' '.join(sorted(missing))}: the model has no such module",
                f"Its modules: {', '.join(there)}.",
            )
        return blocks

    def _shard(self, tensor: torch.Tensor) -> FlatShard:
        """Rows are sharded, and rows that follow one another are a range."""
        if not isinstance(tensor, DTensor):
            return whole(tensor)
        assert all(p.is_replicate() or p.is_shard(0) for p in tensor.placements), tensor.placements
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local: torch.Tensor = tensor.detach().to_local().view(-1)  # type: ignore[attr-defined]
        return FlatShard(local, offset[0] * math.prod(tensor.shape[1:]) if offset else 0, tuple(tensor.shape))

    def _total_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        norm = super()._total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
