"""DeepSpeed ZeRO: optimizer state (1), gradients (2) and parameters (3) partitioned over the ranks."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from toolkit.errors import ConfigError, nearest
from toolkit.precision import GROWTH_INTERVAL, INITIAL_LOSS_SCALE, MINIMUM_LOSS_SCALE
from toolkit.strategies.base import BuildOptimizer, Layout, Strategy, Update

RECIPE_DECIDES = 'The recipe decides it: set it to "auto" or leave it out'

# Keys that DeepSpeed reads beside those that `_engine_config` sets. It ignores others without a word.
USER_KEYS = frozenset(
    {
        "comms_logger",
        "communication_data_type",
        "data_types",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "log_level",
        "memory_breakdown",
        "steps_per_print",
        "timers",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
# What DeepSpeed reads, but never gets to use here (its own data loader, checkpoints, compiler, NVMe, monitors), or
# what would change what a step computes, or who computes it, behind the back of the recipe.
REFUSED_KEYS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "amp",
        "autotuning",
        "checkpoint",
        "comet",
        "compile",
        "compression_training",
        "csv_monitor",
        "curriculum_learning",
        "data_efficiency",
        "dataloader_drop_last",
        "disable_allgather",
        "elasticity",
        "expert_parallel",
        "gradient_allreduce_op",
        "gradient_predivide_factor",
        "hybrid_engine",
        "managed_gradient_accumulation",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "progressive_layer_drop",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sparse_attention",
        "tensor_parallel",
        "tensorboard",
        "torch_autocast",
        "wandb",
        "weight_quantization",
    }
)


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
        deepspeed = _import_deepspeed(self.world.device)
        config = self._engine_config()
        # DeepSpeed rounds the weights to the reduced precision before it copies its fp32 masters from them.
        masters = {n: p.detach().clone() for n, p in model.named_parameters()} if self.precision.reduced else {}
        if self.world.size == 1:
            self.world.form_group()
        with _quiet():
            if not deepspeed.comm.is_initialized():
                backend = "gloo" if self.world.device.type == "cpu" else "nccl"
                deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
            optimizer = build_optimizer(model.to(self.world.device))
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
        for name, parameter in self.module.named_parameters():
            if name in masters and parameter.requires_grad:
                self._set_master(parameter, masters[name].to(self.world.device))
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

    def update(self, learning_rate: float) -> Update:
        """DeepSpeed unscales, clips by the global norm, steps and clears."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        scale = float(self.optimizer.loss_scale) if self.precision.name == "fp16" else None
        self.engine.step()
        applied = bool(self.engine.was_step_applied())
        norm = float(self.engine.get_global_grad_norm()) if applied else math.nan
        # DeepSpeed reports a norm of -1 where it met Inf or NaN.
        return Update(norm if norm >= 0 else math.nan, applied, scale)

    def weights(self) -> dict[str, torch.Tensor]:
        """fp32 masters, gathered parameter by parameter; frozen parameters and buffers as they are."""
        deepspeed = _import_deepspeed(self.world.device)
        state = {}
        for name, parameter in self.module.named_parameters():
            full = deepspeed.utils.safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            if full is None:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    full = parameter.detach().clone()
            if self.world.main:
                state[name] = full.detach().float().cpu().clone()
        if self.world.main:
            state |= {name: buffer.detach().cpu().clone() for name, buffer in _persistent_buffers(self.module)}
        return state

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
            "betas": list(group["betas"]),
            "eps": group["eps"],
            "weight_decay": [group["weight_decay"] for group in self.optimizer.param_groups],
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

    def _partitions(self) -> list[torch.Tensor]:
        """The fp32 shards that the optimizer of this rank steps."""
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def _set_master(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        utils = _import_deepspeed(self.world.device).utils
        if self.stage != 3:
            utils.safe_set_full_fp32_param(parameter, value)
            return
        # DeepSpeed's own setter of full values cannot do a size that the ranks do not divide: cut and pad here.
        share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = F.pad(value.flatten(), (0, share * self.world.size - value.numel()))
        utils.safe_set_local_fp32_param(parameter, padded[share * self.world.rank : share * (self.world.rank + 1)])

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

    def _engine_config(self) -> dict[str, Any]:
        """DeepSpeed's configuration: the user's JSON, with what the recipe decides laid over it.

        Raises:
            ConfigError: a key of the JSON that contradicts the recipe, or that DeepSpeed or the recipe would ignore.
        """
        path = self.config.deepspeed
        config = {key: value for key, value in (_read_json(path) if path else {}).items() if value != "auto"}
        decided: dict[str, Any] = {
            "train_batch_size": self.shape.global_batch,
            "train_micro_batch_size_per_gpu": self.shape.micro_batch,
            "gradient_accumulation_steps": self.shape.accumulation,
            "gradient_clipping": self.max_grad_norm or 0.0,
            "bf16": {"enabled": self.precision.name == "bf16"},
            "fp16": {
                "enabled": self.precision.name == "fp16",
                "loss_scale": 0,  # dynamic
                "initial_scale_power": round(math.log2(INITIAL_LOSS_SCALE)),
                "loss_scale_window": GROWTH_INTERVAL,
                "min_loss_scale": int(MINIMUM_LOSS_SCALE),
                "hysteresis": 1,
            },
        }
        for key in config:
            if key in REFUSED_KEYS:
                raise ConfigError(f"'{key}' in {path} has no effect in this recipe", "Take it out of the JSON.")
            if key not in USER_KEYS and key not in decided:
                known = [*USER_KEYS, *decided]
                raise ConfigError(f"DeepSpeed would ignore '{key}' in {path}.{nearest(key, known)}", "Take it out.")
        for key, value in decided.items():
            _agree(config.get(key), value, key, path)
        config |= decided
        config["zero_optimization"] = self._zero_section(config.get("zero_optimization", {}), path)
        config.setdefault("communication_data_type", "fp32")
        config.setdefault("zero_force_ds_cpu_optimizer", False)
        config.setdefault("steps_per_print", 2**31)
        return config

    def _zero_section(self, content: Any, path: Path | None) -> dict[str, Any]:
        if not isinstance(content, dict):
            raise ConfigError(f"'zero_optimization' in {path} must be an object, not {content!r}", "Correct the JSON.")
        _agree(content.get("stage"), self.stage, "zero_optimization.stage", path)
        # "auto" means "leave it to the recipe", which leaves it to DeepSpeed's default.
        section: dict[str, Any] = {key: value for key, value in content.items() if value != "auto"}
        section["stage"] = self.stage
        for key, value in section.items():
            for_stage_3 = key.startswith("stage3_") and self.stage != 3
            if for_stage_3 or key.startswith("cpu_offload") or (key, value) == ("compute_grad_norm", False):
                raise ConfigError(
                    f"'zero_optimization.{key}' in {path} has no place in {self.name}",
                    "Take it out. What to offload is said by --strategy.offload.",
                )
        checked = _check_zero_section(section, path, self.world.device) if path else None
        for part, wanted in (
            ("offload_optimizer", self.config.offload in ("optimizer", "parameters")),
            ("offload_param", self.config.offload == "parameters"),
        ):
            found = getattr(checked, part, None)
            if found is not None and found.device != ("cpu" if wanted else "none"):
                raise ConfigError(
                    f"zero_optimization.{part}: {found.device} in {path} contradicts --strategy.offload "
                    f"{self.config.offload}",
                    "Ask for it with --strategy.offload, or take it out of the JSON.",
                )
            if wanted:
                section[part] = {"device": "cpu", "pin_memory": True} | (section.get(part) or {})
        return section


def _check_zero_section(section: dict[str, Any], path: Path, device: torch.device) -> Any:
    """DeepSpeed's own object for the section, which knows its keys and their types."""
    _import_deepspeed(device)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        return DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
        wrong = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            hint = nearest(key, known) if item["type"] == "extra_forbidden" else ""
            wrong.append(f"'zero_optimization.{key}': {item['msg']}.{hint}")
        raise ConfigError(f"in {path}: {' '.join(wrong)}", "See DeepSpeed's documentation of its JSON.") from error


def _agree(found: Any, decided: Any, key: str, path: Path | None) -> None:
    """Refuse a value that is neither left out, nor "auto", nor the recipe's own."""
    if found in (None, "auto", decided):
        return
    if not (isinstance(decided, dict) and isinstance(found, dict)):
        raise ConfigError(f"'{key}': {found} in {path} contradicts the recipe's {decided}", f"{RECIPE_DECIDES}.")
    for name, value in found.items():
        if name not in decided:
            raise ConfigError(
                f"'{key}.{name}' in {path} has no effect in this recipe.{nearest(name, decided)}", "Take it out."
            )
        # What is off has no say in how it would work.
        if name == "enabled" or decided["enabled"]:
            _agree(value, decided[name], f"{key}.{name}", path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ConfigError(f"--strategy.deepspeed {path}: {error.strerror}", "Name a DeepSpeed JSON file.") from error
    except ValueError as error:
        raise ConfigError(f"--strategy.deepspeed {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--strategy.deepspeed {path} must hold an object", "Correct the JSON.")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} stands twice")
    return dict(pairs)


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    persistent = module.state_dict().keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, which takes seconds to import, for the runs that use it."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # or it takes the GPU that it finds
    try:
        with _quiet():
            import deepspeed
    except ImportError as error:
        raise ConfigError(f"ZeRO needs DeepSpeed: {error}", "pip install -c constraints.txt deepspeed") from error
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # DeepSpeed prints its build and import notes to stdout, in the middle of the recipe's tables.
    with contextlib.redirect_stdout(io.StringIO()):
        yield
