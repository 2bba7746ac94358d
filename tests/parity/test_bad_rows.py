"""Rows that cannot be computed on stop nobody: they are left out, and all strategies still agree on the rest."""

from __future__ import annotations

import functools
import multiprocessing
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.parity.job import CLASSES, Recording, tiny_bert, tiny_data, tiny_tokenizer
from tests.ranks import on_ranks
from toolkit.config import OptimConfig, StrategyConfig
from toolkit.data.loader import Loader, batch_shape, epoch_order
from toolkit.engine import StepResult, evaluate, train_step
from toolkit.optim import adamw
from toolkit.precision import Precision
from toolkit.strategies import choose_strategy
from toolkit.tasks import Batch, Classification
from toolkit.world import world

SEED = 5
GLOBAL_BATCH = 8
SAMPLES = 41
STEPS = 9
POSITIONS = 32
LR = 1e-3
# Places in the order of the first epoch, whose steps are of 8, 8, 8, 8, 8 and 1 samples. One process and two both take
# two micro-batches a step. The last step's only row is lent to the second of two ranks as a filler.
BAD_PLACES = {
    "some of a step": [0, 3],
    "the second rank's first micro-batch": [9, 11],
    "the first micro-batch of each rank": [16, 17, 18, 19],
    "a whole step": list(range(24, 32)),
    "all that the second rank has in a step": [33, 35, 37, 39],
    "the only row of a step": [40],
}
LEFT_OF_A_STEP = [6, 6, 4, 0, 4, 0]
BREAKS: list[dict[str, Any]] = [
    {"input_ids": [5, 10**6, 6]},
    {"input_ids": []},
    {"input_ids": [5] * (POSITIONS + 1)},
    {"input_ids": None},
    {"input_ids": [5, -7]},
    {"label": CLASSES},
    {"label": None},
]


@functools.cache
def bad_rows() -> list[int]:
    order = epoch_order(SEED, 0, SAMPLES).tolist()
    return [order[place] for places in BAD_PLACES.values() for place in places]


@functools.cache
def damaged_data() -> Dataset:
    columns = tiny_data(SAMPLES).to_dict()
    for number, row in enumerate(bad_rows()):
        for name, value in BREAKS[number % len(BREAKS)].items():
            columns[name][row] = value
    return Dataset.from_dict(columns)


class Counting(Recording):
    """Notes how many forwards each step had."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = POSITIONS
        self.forwards: list[int] = []

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        self.forwards[-1] += 1
        return super().loss(outputs, batch)


@dataclass
class Outcome:
    """What one rank saw."""

    results: list[StepResult]
    skipped: list[list[tuple[int, str]]]
    samples_seen: list[int]
    forwards: list[int]
    seen: list[list[int]]
    evaluation: dict[str, Any]
    weights: dict[str, np.ndarray[Any, Any]]


def train(name: str, workers: int) -> Outcome:
    # A rank of a test is a daemon, which may have no children, and starts processes as it was started. The loader's
    # workers are children, and forked in a run.
    multiprocessing.current_process().daemon = False
    multiprocessing.set_start_method("fork", force=True)
    w = world()
    w.connect()
    shape = batch_shape(GLOBAL_BATCH, GLOBAL_BATCH // w.size // 2, w.size)
    strategy = choose_strategy(
        StrategyConfig(name=name),  # type: ignore[arg-type]
        world=w,
        precision=Precision("fp32"),
        shape=shape,
        max_grad_norm=None,
    )
    strategy.setup(tiny_bert(), lambda wrapped: adamw(wrapped, OptimConfig(lr=LR)))
    task = Counting()
    loader = Loader(damaged_data(), task.collate, shape, rank=w.rank, seed=SEED, workers=workers, problem=task.problem)
    results, skipped, samples_seen = [], [], []
    for step in loader.steps(STEPS):
        task.seen.append([])
        task.forwards.append(0)
        results.append(train_step(strategy, task, step, learning_rate=LR, seed=SEED))
        skipped.append(step.skipped)
        samples_seen.append(step.samples_seen)
    evaluation = evaluate(strategy, task, loader)
    weights = {name: tensor.numpy() for name, tensor in strategy.weights().items()}
    strategy.teardown()
    w.close()
    return Outcome(results, skipped, samples_seen, task.forwards, task.seen, evaluation, weights)


@dataclass
class Expected:
    losses: list[float]
    ids: list[list[int]]
    bad_ids: list[list[int]]
    weights: dict[str, np.ndarray[Any, Any]]


@functools.cache
def by_hand() -> Expected:
    """The bare loop over what is left of each step; nothing happens where nothing is left."""
    data, bad = damaged_data(), set(bad_rows())
    task = Classification([f"class {i}" for i in range(CLASSES)], tiny_tokenizer())
    model = tiny_bert().train()
    optimizer = adamw(model, OptimConfig(lr=LR))
    expected = Expected([], [], [], {})
    orders = [epoch_order(SEED, epoch, SAMPLES).tolist() for epoch in range(2)]
    for rows in [order[start : start + GLOBAL_BATCH] for order in orders for start in range(0, SAMPLES, GLOBAL_BATCH)]:
        fit = [row for row in rows if row not in bad]
        expected.ids.append([1000 + row for row in fit])
        expected.bad_ids.append([1000 + row for row in rows if row in bad])
        if not fit:
            expected.losses.append(float("nan"))
            continue
        batch = task.collate(data[fit], empty=False)
        loss = torch.nn.functional.cross_entropy(model(**batch.inputs).logits, batch.labels)
        expected.losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if len(expected.losses) == STEPS:
            break
    expected.weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return expected


@pytest.mark.parametrize("fault", BREAKS, ids=str)
def test_each_fault_stops_who_does_not_look_for_it(fault: dict[str, Any]) -> None:
    row = tiny_data(SAMPLES)[0] | fault
    task = Counting()
    assert task.problem(row)

    def use() -> None:
        batch = task.collate({name: [value] for name, value in row.items()}, empty=False)
        Classification.loss(task, tiny_bert()(**batch.inputs), batch)

    with pytest.raises((IndexError, ValueError, TypeError, RuntimeError, AttributeError)):
        use()


@pytest.mark.parametrize(
    ("name", "ranks", "workers"),
    [
        ("single", 1, 0),
        ("single", 1, 2),
        ("ddp", 2, 0),
        ("ddp", 2, 2),
        ("fsdp", 2, 0),
        ("zero3", 2, 0),
        ("zero3", 2, 2),
    ],
)
def test_bad_rows(name: str, ranks: int, workers: int) -> None:
    outcomes = on_ranks(train, ranks, name, workers, timeout=60)
    expected = by_hand()
    assert len(expected.losses) == STEPS
    results = outcomes[0].results
    assert [r.loss for r in results] == pytest.approx(expected.losses, rel=1e-5, nan_ok=True)
    assert [r.units for r in results] == [len(ids) for ids in expected.ids]
    assert [r.units for r in results[: len(LEFT_OF_A_STEP)]] == LEFT_OF_A_STEP
    assert [r.applied for r in results] == [bool(ids) for ids in expected.ids]
    assert [r.skipped_rows for r in results] == [len(ids) for ids in expected.bad_ids]
    # All ranks come to the same figures, after as many forwards, none of which a step without a fit row has.
    assert len({repr([(r.loss, r.grad_norm, r.units, r.applied) for r in o.results]) for o in outcomes}) == 1
    assert len({tuple(r.skipped_rows for r in outcome.results) for outcome in outcomes}) == 1
    assert len({tuple(outcome.forwards) for outcome in outcomes}) == 1
    assert [forwards > 0 for forwards in outcomes[0].forwards] == [bool(ids) for ids in expected.ids]
    check_rows(outcomes, expected)
    check_evaluation(outcomes)
    apart = sum(float(((outcomes[0].weights[n] - tensor) ** 2).sum()) for n, tensor in expected.weights.items())
    assert apart**0.5 < 1e-5 * sum(float((tensor**2).sum()) for tensor in expected.weights.values()) ** 0.5


def check_rows(outcomes: list[Outcome], expected: Expected) -> None:
    """Each row was computed on or named, once, by the rank to which it was dealt; and all of them are consumed."""
    for step in range(STEPS):
        assert sorted(i for outcome in outcomes for i in outcome.seen[step]) == sorted(expected.ids[step])
        named = [id_ for outcome in outcomes for id_, _ in outcome.skipped[step]]
        assert sorted(named) == sorted(expected.bad_ids[step])
    assert outcomes[0].samples_seen == [8, 16, 24, 32, 40, 41, 49, 57, 65]
    task, data = Counting(), damaged_data()
    for outcome in outcomes:
        for id_, reason in (row for step in outcome.skipped for row in step):
            assert reason == task.problem(data[id_ - 1000]) != ""


def check_evaluation(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.evaluation["units"] == SAMPLES - len(bad_rows())
        assert sorted(id_ for id_, _ in outcome.evaluation["skipped"]) == sorted(1000 + row for row in bad_rows())
        assert outcome.evaluation == outcomes[0].evaluation
