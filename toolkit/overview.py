"""What a run is about to do, for the screen and for the manifest of its folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from toolkit.config import AdapterConfig, RecipeConfig, plain
from toolkit.environment import cores_of_this_process
from toolkit.optim import Schedule
from toolkit.report import build_manifest
from toolkit.strategies import Strategy
from toolkit.world import World


def overview(
    strategy: Strategy, schedule: Schedule, config: RecipeConfig, steps_per_epoch: int
) -> dict[str, dict[str, str]]:
    """The rows of the plan on strategy and training: section → {name: value}."""
    effective, shape, precision, world = strategy.effective(), strategy.shape, strategy.precision, strategy.world
    held = f", {effective['share_of_this_rank']:.0%} of it here" if "share_of_this_rank" in effective else ""
    return {
        "strategy": {
            "name": f"{strategy.name} ({effective['engine']}{held})",
            "ranks": f"{world.size} on {world.device.type}",
            "precision": f"{precision.name} ({precision.reason})",
        }
        | _threads(world)
        | _slow_links(effective),
        "training": {
            "steps": f"{schedule.total_steps:,} ({schedule.total_steps / steps_per_epoch:.2f} epochs)",
            "batch": f"{shape.global_batch} = {shape.micro_batch} × {shape.accumulation} accumulated "
            f"× {shape.ranks} ranks",
            "optimizer": f"{config.optim.name} ({effective['optimizer']}), weight decay {config.optim.weight_decay:g}, "
            f"gradients clipped to {config.train.max_grad_norm or 'nothing'}",
            "learning rate": f"{schedule.kind} from {schedule.peak:g}, {schedule.warmup_steps} steps of warm-up"
            + _ratio(config),
            "seed": str(config.run.seed),
        },
    }


def _threads(world: World) -> dict[str, str]:
    """Where cores lie idle: a bare `accelerate launch` gives each process one thread, and says nothing of it."""
    threads, cores = torch.get_num_threads(), cores_of_this_process()
    if world.device.type != "cpu" or threads * world.local_size >= cores:
        return {}
    all_of_them = f"--num_cpu_threads_per_process {cores // world.local_size}"
    return {"threads": f"{threads * world.local_size} on {cores} cores; accelerate launch {all_of_them} uses all"}


def _ratio(config: RecipeConfig) -> str:
    ratio = getattr(config, "adapter", AdapterConfig()).lr_ratio
    return f"; {ratio:g} × that for second factors" if ratio else ""


def _slow_links(effective: Mapping[str, Any]) -> dict[str, str]:
    if "local_steps" in effective:
        return {
            "meetings": f"every {effective['local_steps']} steps and before evaluations; outer learning rate "
            f"{effective['outer_lr']:g}, momentum {effective['outer_momentum']:g}"
        }
    if effective.get("compress", "none") == "none":
        return {}
    if effective["compress"] == "bf16":
        return {"gradients": "sent in bf16"}
    return {
        "gradients": f"sent by PowerSGD of rank {effective['compress_rank']} after {effective['compress_start']} steps "
        f"in full; on a resume, {effective['compress_on_resume']}"
    }


def manifest(strategy: Strategy, schedule: Schedule, config: RecipeConfig, data_fingerprint: str) -> dict[str, Any]:
    """All that is needed to tell this run from another: see `build_manifest`."""
    world = strategy.world
    effective = strategy.effective() | {
        "total_steps": schedule.total_steps,
        "warmup_steps": schedule.warmup_steps,
        "learning_rate": schedule.peak,
        "launcher": {"strategy": world.launcher.strategy, "precision": world.launcher.precision},
    }
    ranks = {"ranks": world.size, "local_ranks": world.local_size, "device": world.device.type}
    return build_manifest(sys.argv, config.run.seed, data_fingerprint, plain(config), effective, ranks)
