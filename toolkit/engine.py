"""One optimizer step and one evaluation: the only place that counts.

The loss of a step is the sum over all ranks and micro-batches divided by the units of all of them, so it does not
depend on how the samples lie. Every rank makes the same number of forwards in both functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.data.loader import Loader, Step
from toolkit.errors import NumericsError
from toolkit.strategies import Strategy
from toolkit.tasks import Task


@dataclass(frozen=True)
class StepResult:
    """The figures of one optimizer step, alike on every rank.

    Attributes:
        loss: mean over the units of all ranks.
        grad_norm: global norm before clipping; NaN where the step was skipped.
        units: of all ranks.
        applied: False where fp16's loss scaler skipped the step.
        loss_scale: for fp16 only.
    """

    loss: float
    grad_norm: float
    units: int
    applied: bool
    loss_scale: float | None


def train_step(strategy: Strategy, task: Task, step: Step, *, learning_rate: float, seed: int) -> StepResult:
    """Forward and backward over the step's micro-batches, then one update.

    Dropout is seeded by (seed, step, rank), so that a step is the same whenever it is run again.

    Raises:
        NumericsError: the loss or the gradient is not finite; raised on all ranks alike, before the update.
    """
    world = strategy.world
    seed_all(seed, step.number, world.rank)
    strategy.model.train()
    units = world.sum(torch.tensor(float(sum(map(task.units, step.micro_batches))), device=world.device))
    loss = torch.zeros((), device=world.device)
    for index, batch in enumerate(step.micro_batches):
        batch = batch.to(world.device)
        with strategy.micro_batch(last=index + 1 == len(step.micro_batches)):
            part = task.loss(strategy.forward(batch.inputs), batch) / units
            strategy.backward(part)
        loss += part.detach()
    own, total = float(loss), float(world.sum(loss))
    if not math.isfinite(total):
        _stop(strategy, step, "loss", total, own)
    update = strategy.update(learning_rate)
    if not math.isfinite(update.grad_norm) and update.loss_scale is None:
        _stop(strategy, step, "gradient norm", update.grad_norm, own)
    return StepResult(total, update.grad_norm, int(units), update.applied, update.loss_scale)


@torch.no_grad()
def evaluate(
    strategy: Strategy, task: Task, loader: Loader, on_batch: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """The task's metrics over all samples of `loader`, each counted once; alike on every rank.

    Args:
        strategy: holds the model.
        task: says what to count.
        loader: deals the samples to the ranks.
        on_batch: called with the number of batches done, for progress.
    """
    strategy.model.eval()
    counts: dict[str, torch.Tensor] = {}
    for done, batch in enumerate(loader.once(), start=1):
        batch = batch.to(strategy.world.device)
        for name, count in task.measure(strategy.forward(batch.inputs), batch).items():
            counts[name] = counts[name] + count if name in counts else count
        on_batch(done)
    return task.metrics({name: strategy.world.sum(count) for name, count in counts.items()})


def seed_all(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators by (seed, step, rank)."""
    # A 63-bit mix (the golden ratio's odd multiples, as in SplitMix64): neighbouring steps must not share streams.
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63
    torch.manual_seed(mixed)


def _stop(strategy: Strategy, step: Step, what: str, value: float, own_loss: float) -> None:
    ids = [id_ for batch in step.micro_batches for id_ in batch.ids]
    reports = strategy.world.gather((own_loss, ids))
    # A loss that is not finite names its ranks. A gradient is known only as the sum over all ranks.
    at_fault = [rank for rank, (loss, _) in enumerate(reports) if not math.isfinite(loss)] or range(len(reports))
    samples = "; ".join(f"rank {rank}: samples {reports[rank][1]}" for rank in at_fault)
    raise NumericsError(
        f"the {what} is {value} at step {step.number} ({samples})",
        "Nothing was applied at this step. Lower --optim.lr, use --precision bf16 or fp32, or look at these samples.",
    )
