"""One optimizer step and one evaluation: the only place that counts.

The loss of a step is the sum over all ranks and micro-batches divided by the units of all of them, so it does not
depend on how the samples lie. Every rank makes the same number of forwards in both functions.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.data.loader import Loader, Step
from toolkit.graphs import Graphs
from toolkit.profiler import span
from toolkit.strategies import Strategy
from toolkit.tasks import Batch, Task


@dataclass(frozen=True)
class StepResult:
    """The figures of one optimizer step, alike on every rank.

    Attributes:
        loss: mean over the units of all ranks; NaN where there are none.
        grad_norm: global norm before clipping; NaN where the step was skipped.
        units: of all ranks.
        applied: False where fp16's loss scaler skipped the step, or there was nothing in it.
        loss_scale: for fp16 only, of a step that had units.
        skipped_rows: rows of all ranks that were left out as unfit; `Step.skipped` names this rank's.
        fault: why nothing was applied though there was something in it, with the samples; empty otherwise.
        busy: seconds of this rank, and no other, in forward.
    """

    loss: float
    grad_norm: float
    units: int
    applied: bool
    loss_scale: float | None
    skipped_rows: int
    fault: str = ""
    busy: float = 0.0


def not_finite(loss: float) -> str:
    """Why this loss must not be applied, or an empty text."""
    return "" if math.isfinite(loss) else f"the loss is {loss}"


def train_step(
    strategy: Strategy,
    task: Task,
    step: Step,
    *,
    learning_rate: float,
    seed: int,
    refuse: Callable[[float], str] = not_finite,
    graphs: Graphs | None = None,
) -> StepResult:
    """Forward and backward over the step's micro-batches, then one update; nothing where all rows are unfit.

    Dropout is seeded by (seed, step, rank), so that a step is the same whenever it is run again. What must not be
    learnt from is not applied, and stands in the result as its `fault`; the training state is then to be filled anew,
    or the run to be stopped.

    Args:
        strategy: holds model and optimizer.
        task: says what to compute.
        step: this rank's micro-batches.
        learning_rate: of this step.
        seed: of the run.
        refuse: why the loss of all ranks must not be applied, or an empty text; called alike on all of them.
        graphs: what launches the micro-batches, where that is not done kernel by kernel.
    """
    world = strategy.world
    seed_all(seed, step.number, world.rank)
    strategy.set_training(True)
    own_units = sum(map(task.units, step.micro_batches))
    # Filled in, not copied from the host: an accelerator need not be waited for.
    counts = [torch.full((), float(n), device=world.device) for n in (own_units, len(step.skipped))]
    units, skipped = world.sum(torch.stack(counts)).unbind()
    # A rank with units knows this without waiting for the sum.
    if own_units == 0 and int(units) == 0:
        # Not even an update without a gradient: momentum and decay would move the weights.
        return StepResult(math.nan, math.nan, 0, False, None, int(skipped))
    loss, busy = torch.zeros((), device=world.device), 0.0

    def learn(batch: Batch, units: torch.Tensor) -> torch.Tensor:
        nonlocal busy
        began = time.monotonic()
        with span("forward"):
            part = task.loss(strategy.forward(batch.inputs), batch) / units
        busy += time.monotonic() - began
        with span("backward"):
            strategy.backward(part)
        return part.detach()

    with span("forward"):
        task.survey(step.micro_batches, lambda batch: strategy.forward(batch.to(world.device).inputs), world)
    for index, batch in enumerate(step.micro_batches):
        with strategy.micro_batch(last=index + 1 == len(step.micro_batches)):
            if graphs is None:
                loss += learn(batch.to(world.device), units)
            else:
                loss += graphs.learn(batch, units, learn)
    norm = strategy.gradient_norm()
    figures = [loss, world.sum(loss.clone()), units, skipped, *([] if norm is None else [norm])]
    # The one time in a step that the host waits for an accelerator: what it learns is logged, and decides on the step.
    own, total, all_units, all_skipped, *norms = torch.stack(
        [figure.to(world.device, torch.float64) for figure in figures]
    ).tolist()
    if fault := refuse(total):
        strategy.discard()
        fault = _with_samples(fault, strategy, step, own)
        return StepResult(total, math.nan, int(all_units), False, None, int(all_skipped), fault, busy)
    with span("update"):
        update = strategy.update(learning_rate, *norms)
    if not math.isfinite(update.grad_norm) and update.loss_scale is None:
        fault = _with_samples(f"the gradient norm is {update.grad_norm}", strategy, step, own)
    return StepResult(
        total, update.grad_norm, int(all_units), update.applied, update.loss_scale, int(all_skipped), fault, busy
    )


@torch.no_grad()
def evaluate(
    strategy: Strategy, task: Task, loader: Loader, on_batch: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """The task's metrics over all samples of `loader`, each counted once; alike on every rank.

    `skipped` among them lists id and fault of those that were left out as unfit, of all ranks.

    Args:
        strategy: holds the model.
        task: says what to count.
        loader: deals the samples to the ranks.
        on_batch: called with the number of batches done, for progress.
    """
    strategy.set_training(False)
    counts: dict[str, torch.Tensor] = {}
    skipped: list[tuple[int, str]] = []
    for done, batch in enumerate(loader.once(), start=1):
        batch = batch.to(strategy.world.device)
        for name, count in task.measure(strategy.forward(batch.inputs), batch).items():
            counts[name] = counts[name] + count if name in counts else count
        skipped += batch.skipped
        on_batch(done)
    counts |= task.conclude(strategy.world)
    metrics = task.metrics({name: strategy.world.sum(count) for name, count in counts.items()})
    return metrics | {"skipped": list(itertools.chain.from_iterable(strategy.world.gather(skipped)))}


def seed_all(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators by (seed, step, rank)."""
    # A 63-bit mix (the golden ratio's odd multiples, as in SplitMix64): neighbouring steps must not share streams.
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63
    torch.manual_seed(mixed)


def _with_samples(fault: str, strategy: Strategy, step: Step, own_loss: float) -> str:
    ids = [id_ for batch in step.micro_batches for id_ in batch.ids]
    reports = strategy.world.gather((own_loss, ids))
    # A loss that is not finite names its ranks. A gradient is known only as the sum over all ranks.
    at_fault = [rank for rank, (loss, _) in enumerate(reports) if not math.isfinite(loss)] or range(len(reports))
    samples = "; ".join(f"rank {rank}: samples {reports[rank][1]}" for rank in at_fault)
    return f"{fault} at step {step.number} ({samples})"
