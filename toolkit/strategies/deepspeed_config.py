"""DeepSpeed's configuration: the user's JSON checked against what the recipe decides."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from toolkit.data.loader import BatchShape
from toolkit.errors import ConfigError, nearest
from toolkit.precision import GROWTH_INTERVAL, INITIAL_LOSS_SCALE, MINIMUM_LOSS_SCALE, Precision
from toolkit.strategies.deepspeed_library import import_deepspeed

RECIPE_DECIDES = 'The recipe decides it: set it to "auto" or leave it out'

# Keys that DeepSpeed reads beside those that `engine_config` sets. It ignores others without a word.
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


def engine_config(
    path: Path | None,
    *,
    stage: int,
    offload: str | None,
    shape: BatchShape,
    precision: Precision,
    max_grad_norm: float | None,
    device: torch.device,
) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's JSON, with what the recipe decides laid over it.

    Args:
        path: the JSON, or None.
        stage, offload, shape, precision, max_grad_norm, device: what the recipe decides; see `Strategy`.

    Raises:
        ConfigError: a key of the JSON that contradicts the recipe, or that DeepSpeed or the recipe would ignore.
    """
    config = {key: value for key, value in (_read_json(path) if path else {}).items() if value != "auto"}
    decided: dict[str, Any] = {
        "train_batch_size": shape.global_batch,
        "train_micro_batch_size_per_gpu": shape.micro_batch,
        "gradient_accumulation_steps": shape.accumulation,
        "gradient_clipping": max_grad_norm or 0.0,
        "bf16": {"enabled": precision.dtype == torch.bfloat16},
        "fp16": {
            "enabled": precision.name == "fp16",
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
    config["zero_optimization"] = _zero_section(config.get("zero_optimization", {}), path, stage, offload, device)
    config.setdefault("communication_data_type", "fp32")
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("zero_allow_untested_optimizer", True)  # the parity tests cover those of recipes
    config.setdefault("steps_per_print", 2**31)
    return config


def _zero_section(
    content: Any, path: Path | None, stage: int, offload: str | None, device: torch.device
) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"'zero_optimization' in {path} must be an object, not {content!r}", "Correct the JSON.")
    _agree(content.get("stage"), stage, "zero_optimization.stage", path)
    # "auto" means "leave it to the recipe", which leaves it to DeepSpeed's default.
    section: dict[str, Any] = {key: value for key, value in content.items() if value != "auto"}
    section["stage"] = stage
    for key, value in section.items():
        for_stage_3 = key.startswith("stage3_") and stage != 3
        if for_stage_3 or key.startswith("cpu_offload") or (key, value) == ("compute_grad_norm", False):
            raise ConfigError(
                f"'zero_optimization.{key}' in {path} has no place in ZeRO-{stage}",
                "Take it out. What to offload is said by --strategy.offload.",
            )
    checked = _check_zero_section(section, path, device) if path else None
    for part, wanted in (
        ("offload_optimizer", offload in ("optimizer", "parameters")),
        ("offload_param", offload == "parameters"),
    ):
        found = getattr(checked, part, None)
        if found is not None and found.device != ("cpu" if wanted else "none"):
            raise ConfigError(
                f"zero_optimization.{part}: {found.device} in {path} contradicts --strategy.offload {offload}",
                "Ask for it with --strategy.offload, or take it out of the JSON.",
            )
        if wanted:
            section[part] = {"device": "cpu", "pin_memory": True} | (section.get(part) or {})
    return section


def _check_zero_section(section: dict[str, Any], path: Path, device: torch.device) -> Any:
    """DeepSpeed's own object for the section, which knows its keys and their types."""
    import_deepspeed(device)
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
