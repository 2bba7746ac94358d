"""DeepSpeed ZeRO: optimizer state (1), gradients (2) and parameters (3) partitioned over the ranks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from toolkit.errors import ConfigError
from toolkit.models import repeated_blocks
from toolkit.optim import set_learning_rate
from toolkit.quantization import describe_quantization
from toolkit.strategies.base import BuildOptimizer, Layout, Strategy, Update, persistent_buffers
from toolkit.strategies.deepspeed_config import engine_config
from toolkit.strategies.deepspeed_library import import_deepspeed, quiet
from toolkit.strategies.state import MOMENTS, FlatShard, adam_state, held_apart, put_back, whole


class Zero(Strategy):
    """`deepspeed.initialize` around the plain model, with the recipe's own optimizer."""

    layouts: ClassVar[Mapping[str, tuple[Layout, ...]]] = {
        "zero1": (Layout(2),),
        "zero2": (Layout(2),),
        "zero3": (Layout(2),),
    }
    options: ClassVar[frozenset[str]] = frozenset({"offload", "deepspeed"})

    @property
    def stage(self) -> int:
        """1, 2 or 3."""
        return int(self.name[-1])

    def check(self) -> None:
        """Refuse one process (unless it offloads), an offload that the stage cannot do, and a JSON that disagrees."""
        super().check()
        if self.config.offload in (None, "none"):
            self.require_ranks("partition with")
        if self.config.offload == "parameters" and self.stage != 3:
            raise ConfigError(
                f"--strategy.offload parameters has no effect under {self.name}, which does not partition parameters",
                "Use zero3, or --strategy.offload optimizer.",
            )
        on_cpu = self.world.device.type == "cpu"
        if on_cpu and self.precision.name == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            raise ConfigError(
                f"--precision fp16: DeepSpeed ({self.name}) does not run fp16 on a CPU without AMX-FP16",
                "Use --precision bf16 or fp32, or fp16 under ddp or fsdp.",
            )
        self._engine_config()

    def setup(self, model: nn.Module, build_optimizer: BuildOptimizer) -> None:
        """Hand model and optimizer to DeepSpeed, then read back what it made of the settings."""
        deepspeed = import_deepspeed(self.world.device)
        config = self._engine_config()
        # DeepSpeed rounds the weights to the reduced precision before it copies its fp32 masters from them.
        masters = {n: p.detach() for n, p in model.named_parameters()} if self.precision.reduced else {}
        # It keeps no master of what is frozen: a checkpoint that holds it gets the weights as they came.
        named = ((n, p) for n, p in model.named_parameters() if n not in self.left_out)
        self._frozen = {n: p.detach() for n, p in named if not p.requires_grad}
        if self.world.size == 1:
            self.world.form_group()
        with quiet():
            if not deepspeed.comm.is_initialized():
                backend = "gloo" if self.world.device.type == "cpu" else "nccl"
                deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
            optimizer = build_optimizer(model)  # which asks for the shapes that stage 3 takes away
            self._place(deepspeed, model, config)
            try:
                engine, self.optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
            except (AssertionError, ValueError) as error:
                if self.config.deepspeed is None:
                    raise
                raise ConfigError(
                    f"DeepSpeed does not take {self.config.deepspeed}: {error}", "Correct the JSON."
                ) from error
            self.engine = engine
        self.model = self.engine
        for name, shard in self.shards().items() if masters else ():
            kind, _, parameter = name.partition("/")
            if kind == "weights":
                shard.data.copy_(masters[parameter].view(-1)[shard.start : shard.start + shard.data.numel()])
        self._read_back()

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """The recipe, not DeepSpeed's counter, says which micro-batch ends a step."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield
        if not last:
            self.engine.step()

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """In the precision of DeepSpeed's copies of the weights."""
        return self.engine(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Undo the average over ranks; accumulation is a plain sum."""
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def update(self, learning_rate: float, grad_norm: float | None = None) -> Update:
        """DeepSpeed unscales, clips by the global norm, steps and clears."""
        set_learning_rate(self.optimizer, learning_rate)
        scale = float(self.optimizer.loss_scale) if self.precision.name == "fp16" else None
        self.engine.step()
        applied = bool(self.engine.was_step_applied())
        norm = float(self.engine.get_global_grad_norm()) if applied else math.nan
        # DeepSpeed reports a norm of -1 where it met Inf or NaN.
        return Update(norm if norm >= 0 else math.nan, applied, scale)

    def weights(self) -> dict[str, torch.Tensor]:
        """fp32 masters, gathered parameter by parameter; frozen parameters as they came, buffers as they are."""
        deepspeed = import_deepspeed(self.world.device)
        state = {}
        parameters = dict(self.module.named_parameters())
        for name, parameter in self._to_save(parameters).items():
            full = self._frozen.get(name)  # DeepSpeed's own is rounded
            if full is None:
                full = deepspeed.utils.safe_get_full_fp32_param(parameter)
            if full is None:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    full = parameter.detach().clone()
            if self.world.main:
                state[name] = full.detach().float().cpu().clone()
        if self.world.main:
            state |= {name: buffer.detach().cpu().clone() for name, buffer in persistent_buffers(self.module)}
        return state

    def shards(self) -> dict[str, FlatShard]:
        """fp32 masters and moments out of the flat partitions; what is frozen as it came."""
        found = {f"weights/{name}": whole(tensor) for name, tensor in self._frozen.items()}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                found |= {f"{kind}/{name}": shard for kind, shard in self._shards_of(parameter).items()}
        return found | {f"buffers/{name}": whole(buffer) for name, buffer in persistent_buffers(self.module)}

    def loaded(self) -> None:
        """Round the masters, and what is frozen, into the weights that forward and backward use."""
        put_back(self.optimizer.optimizer)
        self._put_back_frozen()
        if self.stage != 3:
            self.optimizer.update_lp_params()
            return
        self.optimizer.checkpoint_event_prologue()  # lets go of what is gathered
        for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self.optimizer.checkpoint_event_epilogue()

    def scaler_state(self) -> dict[str, float]:
        """DeepSpeed counts the iterations, and notes the one of the last overflow."""
        if self.precision.name != "fp16":
            return {}
        scaler = self.optimizer.loss_scaler
        since = (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window
        return {"scale": float(scaler.cur_scale), "good_steps": since}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Into DeepSpeed's."""
        if self.precision.name == "fp16" and state:
            scaler = self.optimizer.loss_scaler
            scaler.cur_scale = float(state["scale"])
            scaler.last_overflow_iter = scaler.cur_iter - 1 - int(state["good_steps"])

    def discard(self) -> None:
        """Let DeepSpeed clear its buffers in a step that moves nothing; what it does to the moments is filled anew."""
        self.update(0.0)

    @property
    def module(self) -> nn.Module:
        """What the engine wraps."""
        module: nn.Module = self.engine.module
        return module

    def effective(self) -> dict[str, Any]:
        """Read from DeepSpeed's engine and optimizer."""
        engine = self.engine
        parameters = list(self.module.parameters())
        partitions = sum(partition.numel() for partition in self._partitions())
        trainable = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
        group = self.optimizer.param_groups[0]
        return {
            "strategy": self.name,
            "engine": type(engine).__name__,
            "ranks": engine.dp_world_size,
            "device": str(self.world.device),
            "precision": self.precision.name,
            "parameter_dtype": str(self._partitions()[0].dtype).removeprefix("torch."),
            "stage": engine.zero_optimization_stage(),
            "global_batch": engine.train_batch_size(),
            "micro_batch": engine.train_micro_batch_size_per_gpu(),
            "accumulation": engine.gradient_accumulation_steps(),
            "optimizer": f"{type(self.optimizer).__name__}({type(engine.basic_optimizer).__name__})",
            "moment_bits": [group.get("bits", 32) for group in self.optimizer.param_groups],
            "betas": list(group["betas"]),
            "eps": group["eps"],
            "weight_decay": [group["weight_decay"] for group in self.optimizer.param_groups],
            "lr_multiples": [group["multiple"] for group in self.optimizer.param_groups],
            "max_grad_norm": engine.gradient_clipping() or None,
            "share_of_this_rank": partitions / trainable,
            "partitioned_parameters": sum(hasattr(p, "ds_shape") for p in parameters),
            "offload": self.config.offload or "none",
        }

    def teardown(self) -> None:
        """Take DeepSpeed's hooks off the model."""
        self.engine.destroy()
        del self.engine, self.optimizer
        super().teardown()

    def _place(self, deepspeed: Any, model: nn.Module, config: dict[str, Any]) -> None:
        """On the device of this rank: under stage 3 block by block, each partitioned before the next one comes."""
        if self.stage != 3 or describe_quantization(model):
            model.to(self.world.device)
            return
        for part in (*repeated_blocks(model), model):
            for parameter in part.parameters():
                if not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.to(self.precision.dtype)
            deepspeed.zero.Init(module=part, config_dict_or_path=config, dtype=self.precision.dtype)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.world.device)

    def _put_back_frozen(self) -> None:
        deepspeed = import_deepspeed(self.world.device)
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if name in self._frozen:
                    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                        if self.stage != 3 or self.world.main:
                            parameter.copy_(self._frozen[name])

    def _partitions(self) -> list[torch.Tensor]:
        """The fp32 shards that the optimizer of this rank steps."""
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def _shards_of(self, parameter: nn.Parameter) -> dict[str, FlatShard]:
        """Master, moments and count of a trained parameter, where this rank's partition reaches into it."""
        located = self._locate(parameter)
        if located is None:
            return {}
        group, partition, offset, start, size, shape = located
        state = adam_state(self.optimizer.optimizer, partition, self.optimizer.optimizer.param_groups[group])
        kinds = {"weights": partition} | {moment: state[moment] for moment in MOMENTS}
        apart = held_apart(self.optimizer.optimizer)
        found = {
            kind: FlatShard(flat.detach().view(-1).narrow(0, offset, size), start, shape, apart and kind in MOMENTS)
            for kind, flat in kinds.items()
        }
        return found | {"step": whole(state["step"])}

    def _locate(self, parameter: Any) -> tuple[int, torch.Tensor, int, int, int, tuple[int, ...]] | None:
        """Number of the group, partition, offset in it, start in the parameter, elements, and the parameter's shape."""
        if self.stage != 3:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            partition = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            held, here = mapping.lp_fragment_address, mapping.hp_fragment_address
            return mapping.param_group_index, partition, here.start, held.start, held.numel, tuple(parameter.shape)
        group, offset, share = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = share * self.world.rank
        size = min(share, parameter.ds_numel - start)  # the last share is padded
        partition = self.optimizer.fp32_partitioned_groups_flat[group]
        if size <= 0:
            return None
        return self.optimizer.sub_group_to_group_id[group], partition, offset, start, size, tuple(parameter.ds_shape)

    def _engine_config(self) -> dict[str, Any]:
        return engine_config(
            self.config.deepspeed,
            stage=self.stage,
            offload=self.config.offload,
            shape=self.shape,
            precision=self.precision,
            max_grad_norm=self.max_grad_norm,
            device=self.world.device,
        )

    def _read_back(self) -> None:
        wanted = {
            "stage": self.stage,
            "ranks": self.world.size,
            "global_batch": self.shape.global_batch,
            "micro_batch": self.shape.micro_batch,
            "accumulation": self.shape.accumulation,
            "max_grad_norm": self.max_grad_norm,
            "parameter_dtype": "float32",
        }
        found = self.effective()
        wrong = [f"{key}: asked for {value}, got {found[key]}" for key, value in wanted.items() if found[key] != value]
        if wrong:
            raise ConfigError(f"DeepSpeed did not take these settings: {'; '.join(wrong)}")
