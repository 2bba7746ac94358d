"""Training states that are written under one strategy and read under another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from tests.parity.job import GLOBAL_BATCH, Recording, tiny_bert, tiny_data
from toolkit.checkpoint.tensors import own_share, read_tensors, write_tensors
from toolkit.config import OptimConfig, StrategyConfig
from toolkit.data.loader import Loader, batch_shape
from toolkit.engine import train_step
from toolkit.optim import adamw
from toolkit.precision import Precision
from toolkit.strategies import choose_strategy
from toolkit.strategies.state import FlatShard
from toolkit.world import world


@dataclass(frozen=True)
class Stage:
    """One run of a chain: how it trains, what it reads, what it writes."""

    strategy: str
    options: dict[str, Any]
    precision: str = "fp32"
    steps: tuple[int, int] = (0, 0)
    frozen: str = ""
    dropout: float = 0.0
    width: int = 32
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"


def pass_on(stage: Stage, source: str, target: str) -> list[float]:
    """Read the state in `source` (if any), take the steps, write it to `target`; the losses."""
    w = world()
    w.connect()
    shape = batch_shape(GLOBAL_BATCH, None, w.size)
    strategy = choose_strategy(
        StrategyConfig(name=stage.strategy, **stage.options),  # type: ignore[arg-type]
        world=w,
        precision=Precision(stage.precision),
        shape=shape,
        max_grad_norm=1.0,
    )
    model = tiny_bert(stage.dropout, width=stage.width)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (stage.frozen and name.startswith(stage.frozen)))
    strategy.setup(model, lambda wrapped: adamw(wrapped, OptimConfig(name=stage.optimizer, lr=1e-3)))
    if source:
        for shard in strategy.shards().values():
            shard.data.fill_(-77)  # nothing of it may be left
        read_tensors(Path(source), strategy.shards())
        strategy.loaded()
    task = Recording()
    loader = Loader(tiny_data(), task.collate, shape, rank=w.rank, seed=5)
    losses = []
    for step in loader.steps(stage.steps[1], stage.steps[0]):
        task.seen.append([])
        losses.append(train_step(strategy, task, step, learning_rate=1e-3, seed=5).loss)
    group, shards = dist.new_group(backend="gloo") if w.size > 1 else None, strategy.shards()
    share = own_share(shards, group)
    copies = {name: FlatShard(shards[name].data.clone(), shards[name].start, shards[name].shape) for name in share}
    Path(target).mkdir(parents=True, exist_ok=True)
    write_tensors(Path(target), copies, w.rank)
    strategy.teardown()
    w.close()
    return losses


def joined(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor in `folder`, flat and whole, read without DCP."""
    import json

    from safetensors import safe_open

    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118
                pieces.setdefault(name, []).append((offsets[name]["saved_offsets"][0], file.get_tensor(name)))
    return {name: torch.cat([part for _, part in sorted(p, key=lambda x: x[0])]).numpy() for name, p in pieces.items()}
