"""Which strategy: what the recipe's options and `accelerate launch` ask for, and a refusal where they disagree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.config import StrategyConfig
from toolkit.data.loader import BatchShape
from toolkit.environment import Launcher
from toolkit.errors import ConfigError
from toolkit.precision import Precision
from toolkit.strategies.base import Strategy
from toolkit.strategies.ddp import DDP
from toolkit.strategies.diloco import DiLoCo
from toolkit.strategies.fsdp import FSDP
from toolkit.strategies.single import Single
from toolkit.strategies.zero import Zero
from toolkit.world import World

_KINDS: tuple[type[Strategy], ...] = (Single, DDP, DiLoCo, FSDP, Zero)
STRATEGIES = {name: kind for kind in _KINDS for name in kind.layouts}

_FSDP_SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
"""The launcher's names, which it also takes as the numbers 1 to 5."""
_FSDP_REFUSED = (
    ("FSDP_AUTO_WRAP_POLICY", ("SIZE_BASED_WRAP", "NO_WRAP"), "Use TRANSFORMER_BASED_WRAP."),
    ("FSDP_ACTIVATION_CHECKPOINTING", ("TRUE",), "Drop it."),
    ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", ("TRUE",), "Drop it."),
    ("FSDP_FORWARD_PREFETCH", ("TRUE",), "Drop it."),
)


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
    options = launcher.options
    for name, refused, remedy in _FSDP_REFUSED:
        if options.get(name, "").upper() in refused:
            raise ConfigError(f"the launcher asks for {name}={options[name]}, which recipes do not do", remedy)
    if options.get("FSDP_IGNORED_MODULES"):
        raise ConfigError("the launcher asks for --fsdp_ignored_modules, which recipes do not read", "Drop it.")
    sharding = _fsdp_sharding(options)
    wishes: dict[str, Any] = {}
    if sharding in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2"):
        wishes["reshard_after_forward"] = False
    if sharding.startswith("HYBRID"):
        if world.local_size == world.size:
            raise ConfigError(
                f"the launcher's --fsdp_sharding_strategy {sharding} replicates over nodes, and there is one",
                "Use FULL_SHARD or SHARD_GRAD_OP, or --strategy.shard_size for smaller shards.",
            )
        wishes["shard_size"] = world.local_size
    if options.get("FSDP_OFFLOAD_PARAMS", "false") == "true":
        wishes["offload"] = "parameters"
    if options.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        wishes["wrap"] = tuple(part.strip() for part in options["FSDP_TRANSFORMER_CLS_TO_WRAP"].split(","))
    return wishes


def _fsdp_sharding(options: Mapping[str, str]) -> str:
    """Which of the launcher's five layouts it asks for; it has two options for that, which overlap."""
    strategy = options.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    # `accelerate config` writes the layout's name here for FSDP1, and a yes or no for FSDP2.
    reshard = options.get("FSDP_RESHARD_AFTER_FORWARD", "true").upper()
    if options.get("FSDP_VERSION", "1") == "2":
        meanings = {"TRUE": "FULL_SHARD", "FALSE": "SHARD_GRAD_OP"}
    else:
        numbers = {str(number): name for number, name in enumerate(_FSDP_SHARDING, start=1)}
        meanings = {name: name for name in _FSDP_SHARDING} | numbers | {"TRUE": "FULL_SHARD"}
        strategy = meanings.get(strategy, strategy)
    asked = {strategy, meanings.get(reshard, reshard)} - {"FULL_SHARD"} or {"FULL_SHARD"}
    layout = asked.pop()
    if asked or layout not in meanings.values() or layout == "NO_SHARD":
        raise ConfigError(
            f"the launcher asks for --fsdp_sharding_strategy {strategy} and --fsdp_reshard_after_forward "
            f"{reshard.lower()}, which recipes do not do together with --fsdp_version {options.get('FSDP_VERSION', 1)}",
            "Use --fsdp_version 2 with --fsdp_reshard_after_forward true or false (and --strategy.shard_size for "
            "hybrid shards), or --multi_gpu for no shards.",
        )
    return layout


def _zero_wishes(launcher: Launcher) -> dict[str, Any]:
    options = launcher.options
    prefix = "ACCELERATE_DEEPSPEED_"
    wishes: dict[str, Any] = {}
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
    # 0 is DeepSpeed's way to say that nothing is clipped.
    if clipping not in ("none", "auto") and not _is_number(clipping, max_grad_norm or 0.0):
        raise ConfigError(
            f"the launcher asks for --gradient_clipping {clipping}, but --train.max_grad_norm is {max_grad_norm}",
            "Drop one of the two.",
        )


def _is_number(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False
