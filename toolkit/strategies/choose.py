"""Which strategy: what the recipe's options and `accelerate launch` ask for, and a refusal where they disagree."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from toolkit.config import StrategyConfig
from toolkit.data.loader import BatchShape
from toolkit.environment import Launcher
from toolkit.errors import ConfigError
from toolkit.precision import Precision
from toolkit.strategies.base import Strategy
from toolkit.strategies.ddp import DDP
from toolkit.strategies.fsdp import FSDP
from toolkit.strategies.single import Single
from toolkit.strategies.zero import Zero
from toolkit.world import World

STRATEGIES: dict[str, type[Strategy]] = {name: kind for kind in (Single, DDP, FSDP, Zero) for name in kind.layouts}


def choose_strategy(
    config: StrategyConfig,
    *,
    world: World,
    precision: Precision,
    shape: BatchShape,
    max_grad_norm: float | None,
) -> Strategy:
    """The strategy in force, checked.

    Raises:
        ConfigError: the recipe's options and the launcher's disagree, or a setting cannot take effect.
    """
    config = resolve(config, world)
    _check_launcher(world.launcher, shape, max_grad_norm)
    strategy = STRATEGIES[config.name](
        config.name, config, world=world, precision=precision, shape=shape, max_grad_norm=max_grad_norm
    )
    strategy.check()
    return strategy


def resolve(config: StrategyConfig, world: World) -> StrategyConfig:
    """The options with `auto` and the launcher's wishes filled in."""
    launcher = world.launcher
    name = config.name
    if launcher.strategy:
        if name not in ("auto", launcher.strategy):
            raise ConfigError(
                f"--strategy.name {name} contradicts the launcher, which asks for {launcher.strategy}",
                "Drop one of the two.",
            )
        wishes = _fsdp_wishes(launcher, world) if launcher.strategy == "fsdp" else _zero_wishes(launcher)
        for key, wish in wishes.items():
            config = _merge(config, key, wish)
        return dataclasses.replace(config, name=launcher.strategy)  # type: ignore[arg-type]
    if name == "auto":
        return dataclasses.replace(config, name="single" if world.size == 1 else "ddp")
    return config


def _merge(config: StrategyConfig, key: str, wish: Any) -> StrategyConfig:
    own = getattr(config, key)
    if own not in (None, (), wish):
        raise ConfigError(
            f"--strategy.{key} {own} contradicts the launcher, which asks for {wish}", "Drop one of the two."
        )
    return dataclasses.replace(config, **{key: wish})


def _fsdp_wishes(launcher: Launcher, world: World) -> dict[str, Any]:
    options, wishes = launcher.options, {}
    if options.get("FSDP_VERSION", "1") == "1":
        sharding = options.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
        meanings = {
            **dict.fromkeys(("1", "FULL_SHARD"), (True, None)),
            **dict.fromkeys(("2", "SHARD_GRAD_OP"), (False, None)),
            **dict.fromkeys(("4", "HYBRID_SHARD"), (True, world.local_size)),
            **dict.fromkeys(("5", "HYBRID_SHARD_ZERO2"), (False, world.local_size)),
        }
        if sharding not in meanings:
            raise ConfigError(f"the launcher asks for --fsdp_sharding_strategy {sharding}", "Use --multi_gpu for DDP.")
        reshard, shard_size = meanings[sharding]
        if not reshard:
            wishes["reshard_after_forward"] = False
        if shard_size:
            wishes["shard_size"] = shard_size
    elif options.get("FSDP_RESHARD_AFTER_FORWARD", "true") == "false":
        wishes["reshard_after_forward"] = False
    if options.get("FSDP_OFFLOAD_PARAMS", "false") == "true":
        wishes["offload"] = "parameters"
    if options.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        wishes["wrap"] = tuple(options["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(","))
    if options.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        raise ConfigError("the launcher asks for SIZE_BASED_WRAP", "Use TRANSFORMER_BASED_WRAP.")
    if options.get("FSDP_ACTIVATION_CHECKPOINTING", "false") == "true":
        raise ConfigError("the launcher asks for --fsdp_activation_checkpointing, which recipes do not do", "Drop it.")
    return wishes


def _zero_wishes(launcher: Launcher) -> dict[str, Any]:
    options, wishes = launcher.options, {}
    prefix = "ACCELERATE_DEEPSPEED_"
    if options.get(f"{prefix}CONFIG_FILE"):
        wishes["deepspeed"] = Path(options[f"{prefix}CONFIG_FILE"])
    devices = {part: options.get(f"{prefix}OFFLOAD_{part}_DEVICE", "none") for part in ("OPTIMIZER", "PARAM")}
    for part, device in devices.items():
        if device not in ("none", "cpu"):
            raise ConfigError(f"the launcher asks to offload to {device} ({part.lower()})", "Use cpu or none.")
    if devices["PARAM"] == "cpu":
        wishes["offload"] = "parameters"
    elif devices["OPTIMIZER"] == "cpu":
        wishes["offload"] = "optimizer"
    return wishes


def _check_launcher(launcher: Launcher, shape: BatchShape, max_grad_norm: float | None) -> None:
    """The launcher's accumulation and clipping, where it names any, must be the recipe's."""
    accumulation = launcher.options.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    # 1 is the launcher's own default, so it cannot be told from no wish at all.
    if accumulation not in ("1", "auto", str(shape.accumulation)):
        raise ConfigError(
            f"the launcher asks for --gradient_accumulation_steps {accumulation}, but the recipe accumulates "
            f"{shape.accumulation} (--train.global_batch {shape.global_batch} / (micro-batch {shape.micro_batch} × "
            f"{shape.ranks} ranks))",
            "Drop it from the launcher, or set --train.micro_batch to match.",
        )
    clipping = launcher.options.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "auto") and float(clipping) != max_grad_norm:
        raise ConfigError(
            f"the launcher asks for --gradient_clipping {clipping}, but --train.max_grad_norm is {max_grad_norm}",
            "Drop one of the two.",
        )
