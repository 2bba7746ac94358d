"""Ranks that step alone and meet: what they compute, when they agree, and what is saved of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.job import GLOBAL_BATCH, Job, Recording, tiny_bert, tiny_data, train
from tests.parity.state import Stage, joined, pass_on
from tests.ranks import on_ranks
from toolkit.config import OptimConfig, StrategyConfig
from toolkit.data.loader import Loader, batch_shape
from toolkit.engine import seed_all, train_step
from toolkit.environment import Launcher
from toolkit.errors import ConfigError
from toolkit.optim import adamw, build_schedule
from toolkit.precision import Precision
from toolkit.strategies import Strategy, choose_strategy
from toolkit.strategies.state import MOMENTS, adam_state
from toolkit.world import World, world

STEPS, MEETINGS, LR = 4, 3, 2e-3
OPTIM = OptimConfig(lr=LR, schedule="cosine", warmup_steps=2)
LOCAL_SGD = {"local_steps": STEPS, "outer_lr": 1.0, "outer_momentum": 0.0}
NESTEROV = {"local_steps": STEPS, "outer_lr": 0.6, "outer_momentum": 0.8}
Weights = dict[str, np.ndarray[Any, Any]]


def by_hand(ranks: int, options: dict[str, Any]) -> Weights:
    """As the paper has it: a model for each rank, one after the other, and torch's SGD for the meetings."""
    shape = batch_shape(GLOBAL_BATCH, None, ranks)
    task, schedule = Recording(), build_schedule(OPTIM, STEPS * MEETINGS)
    task.seen.append([])
    shared = tiny_bert()
    nesterov = options["outer_momentum"] > 0
    outer = torch.optim.SGD(
        shared.parameters(), lr=options["outer_lr"], momentum=options["outer_momentum"], nesterov=nesterov
    )
    workers = [tiny_bert() for _ in range(ranks)]
    optimizers = [adamw(worker, OPTIM) for worker in workers]
    loaders = [Loader(tiny_data(), task.collate, shape, rank=rank, seed=5) for rank in range(ranks)]
    for steps in zip(*(loader.steps(STEPS * MEETINGS) for loader in loaders), strict=True):
        number = steps[0].number
        units = sum(task.units(batch) for step in steps for batch in step.micro_batches)
        for worker, optimizer, step in zip(workers, optimizers, steps, strict=True):
            worker.train()
            for batch in step.micro_batches:
                (task.loss(worker(**batch.inputs), batch) * ranks / units).backward()
            torch.nn.utils.clip_grad_norm_(worker.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = schedule(number)
            optimizer.step()
            optimizer.zero_grad()
        if number % STEPS == 0:
            meet(shared, outer, workers, optimizers)
    return {name: tensor.detach().numpy() for name, tensor in shared.state_dict().items()}


@torch.no_grad()
def meet(shared: Any, outer: Any, workers: list[Any], optimizers: list[Any]) -> None:
    for parameter, *theirs in zip(shared.parameters(), *(worker.parameters() for worker in workers), strict=True):
        parameter.grad = parameter - sum(theirs) / len(theirs)
    outer.step()
    for worker in workers:
        worker.load_state_dict(shared.state_dict())
    for parameters in zip(*(worker.parameters() for worker in workers), strict=True):
        for moment in MOMENTS:
            states = [optimizer.state[p][moment] for optimizer, p in zip(optimizers, parameters, strict=True)]
            mean = sum(states) / len(states)
            for state in states:
                state.copy_(mean)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("options", [LOCAL_SGD, NESTEROV], ids=["local SGD", "DiLoCo"])
def test_weights_are_those_of_the_algorithm_by_hand(options: dict[str, Any], ranks: int) -> None:
    job = Job("diloco", options, steps=STEPS * MEETINGS, lr=LR)
    outcomes = on_ranks(train, ranks, job)
    expected, began = by_hand(ranks, options), tiny_bert().state_dict()
    for name, found in outcomes[0].weights.items():
        gone = np.linalg.norm(expected[name] - began[name].numpy())
        assert np.linalg.norm(found - expected[name]) <= 1e-3 * gone + 1e-6, name
    assert [outcome.losses for outcome in outcomes] == [outcomes[0].losses] * ranks
    assert [outcome.grad_norms for outcome in outcomes] == [outcomes[0].grad_norms] * ranks
    for seen in zip(*(outcome.seen for outcome in outcomes), strict=True):
        assert len(set().union(*seen)) == sum(map(len, seen)), "ranks see different samples"


def test_it_learns_as_much_as_ddp_does_in_as_many_steps() -> None:
    steps = 10 * STEPS
    alone = on_ranks(train, 2, Job("diloco", {"local_steps": STEPS}, steps=steps, lr=LR))[0].losses
    together = on_ranks(train, 2, Job("ddp", steps=steps, lr=LR))[0].losses
    assert alone != together
    assert np.mean(alone[-3:]) < 1.3 * np.mean(together[-3:]) < 0.8 * together[0]


def set_up(w: World, **options: Any) -> Strategy:
    strategy = choose_strategy(
        StrategyConfig(name="diloco", **options),
        world=w,
        precision=Precision("fp32"),
        shape=batch_shape(GLOBAL_BATCH, None, w.size),
        max_grad_norm=1.0,
    )
    strategy.setup(tiny_bert(), lambda wrapped: adamw(wrapped, OPTIM))
    return strategy


def state(strategy: Any) -> list[np.ndarray[Any, Any]]:
    """Weights and moments of this rank, flat."""
    parameters = list(strategy.module.parameters())
    moments = [[adam_state(strategy.optimizer, p, {})[moment] for p in parameters] for moment in MOMENTS]
    return [torch.cat([t.detach().flatten() for t in each]).numpy().copy() for each in (parameters, *moments)]


def states_after_each_step() -> list[tuple[bool, list[np.ndarray[Any, Any]]]]:
    w = world()
    w.connect()
    strategy = set_up(w, local_steps=3)
    task, found = Recording(), []
    for step in Loader(tiny_data(), task.collate, strategy.shape, rank=w.rank, seed=5).steps(7):
        task.seen.append([])
        train_step(strategy, task, step, learning_rate=LR, seed=5)
        if step.number == 5:
            strategy.synchronize()  # as before an evaluation
        found.append((strategy.synchronized, state(strategy)))
    strategy.teardown()
    w.close()
    return found


def test_ranks_hold_one_state_after_a_meeting_and_none_before() -> None:
    first, second = on_ranks(states_after_each_step, 2)
    together = [synchronized for synchronized, _ in first]
    assert together == [False, False, True, False, True, False, False]
    assert together == [synchronized for synchronized, _ in second]
    for (synchronized, ours), (_, theirs) in zip(first, second, strict=True):
        assert [np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [synchronized] * 3


def update_with_a_fault_on_rank_1(fault: float) -> tuple[bool, float, bool]:
    w = world()
    w.connect()
    strategy: Any = set_up(w)
    seed_all(0, 1, w.rank)
    batch = Recording().collate(tiny_data()[:4], empty=False)
    strategy.backward(torch.nn.functional.cross_entropy(strategy.forward(batch.inputs).logits, batch.labels))
    if w.rank == 1:
        next(strategy.module.parameters()).grad[0] = fault
    before = state(strategy)[0]
    update = strategy.update(LR)
    moved = not np.array_equal(before, state(strategy)[0])
    strategy.teardown()
    w.close()
    return update.applied, update.grad_norm, moved


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_on_one_rank_is_applied_by_none(fault: float) -> None:
    for applied, norm, moved in on_ranks(update_with_a_fault_on_rank_1, 2, fault):
        assert not applied
        assert not math.isfinite(norm)
        assert not moved


def test_the_state_passes_to_other_ranks_and_strategies(tmp_path: Path) -> None:
    def stage(strategy: str, ranks: int, steps: tuple[int, int], source: str, target: str) -> dict[str, Any]:
        options = {"local_steps": 2} if strategy == "diloco" else {}
        source = str(tmp_path / source) if source else ""
        on_ranks(pass_on, ranks, Stage(strategy, options, "fp32", steps=steps), source, str(tmp_path / target))
        return joined(tmp_path / target)

    taught = stage("diloco", 2, (0, 4), "", "taught")
    assert np.abs(taught["outer/classifier.weight"]).max() > 0
    again = stage("diloco", 3, (4, 4), "taught", "again")
    assert taught.keys() == again.keys()
    assert all(np.array_equal(taught[name], again[name]) for name in taught)
    fsdp = stage("fsdp", 2, (4, 4), "taught", "fsdp")
    assert taught.keys() - fsdp.keys() == {f"outer/{name}" for name, _ in tiny_bert().named_parameters()}
    assert all(np.array_equal(taught[name], fsdp[name]) for name in fsdp)


def test_what_is_in_force_is_told() -> None:
    effective = on_ranks(train, 2, Job("diloco", {"outer_lr": 0.5}, steps=3))[0].effective
    assert (effective["local_steps"], effective["outer_lr"], effective["outer_momentum"]) == (20, 0.5, 0.9)


def test_fp16_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not work with --precision fp16"):
        choose_strategy(
            StrategyConfig(name="diloco"),
            world=World(0, 2, 0, 2, torch.device("cpu"), Launcher()),
            precision=Precision("fp16"),
            shape=batch_shape(GLOBAL_BATCH, None, 2),
            max_grad_norm=None,
        )
