"""A run goes on under another number of ranks, or another strategy: the same samples, the same curve."""

from __future__ import annotations

import functools
import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.jobs import Job, figures, finish, report
from tests.faults.trapped import Trap, main
from toolkit.checkpoint.account import account
from toolkit.checkpoint.attempts import Attempts, ledgers

STEPS = 15
TOLERANCE = 1e-6
"""Of a loss, relative: sums over ranks are taken in another order."""


@dataclass(frozen=True)
class Leg:
    """A part of a run: on how many ranks, under which strategy, until which trap."""

    ranks: int
    strategy: str
    trap: Trap = Trap()


def stopped(step: int) -> Trap:
    return Trap("step", step, signal=signal.SIGTERM)


@pytest.fixture
def job(tiny_job: list[str]) -> list[str]:
    return [*tiny_job, "--train.steps", str(STEPS), "--checkpoint.every", "2", "--optim.schedule", "cosine"]


@pytest.fixture(scope="module")
def cache() -> dict[str, Path]:
    return {}


@pytest.fixture
def whole(job: list[str], cache: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process without an interruption."""
    if "run" not in cache:
        cache["run"] = tmp_path_factory.mktemp("whole") / "run"
        finish(job, cache["run"])
    return cache["run"]


def travel(job: list[str], run: Path, legs: list[Leg]) -> None:
    for leg in legs:
        options = [*job, "--strategy.name", leg.strategy, "--checkpoint.allow_change", "strategy.name"]
        ended = Job(options, run, leg.ranks, functools.partial(main, trap=leg.trap)).wait()
        code = {"never": 0}.get(leg.trap.place, 75 if leg.trap.signal == signal.SIGTERM else -leg.trap.signal)
        assert ended.codes == [code] * leg.ranks, ended.text


def consumed(run: Path) -> dict[int, list[int]]:
    """The samples of each step, as it counts in the end."""
    steps: dict[int, list[int]] = {}
    for attempt in Attempts(run).read():
        steps = {step: ids for step, ids in steps.items() if step <= attempt.from_step}
        for path in ledgers(run, attempt.number).values():
            for line in map(json.loads, path.read_text().splitlines()):
                steps.setdefault(line["step"], []).extend(line["ids"])
    return {step: sorted(ids) for step, ids in steps.items()}


def check(run: Path, whole: Path) -> None:
    assert consumed(run) == consumed(whole)
    accounted = account(run)
    assert (accounted.lost, accounted.duplicate, accounted.misplaced, accounted.in_flight) == (0, 0, 0, 0)
    assert (accounted.steps, accounted.samples) == (STEPS, 2 * 84 + 12)
    ours, theirs = figures(run), figures(whole)
    for exact in ("step", "epoch", "lr", "units", "samples_seen"):
        assert [line[exact] for line in ours] == [line[exact] for line in theirs]
    for close in ("loss", "grad_norm"):
        assert [line[close] for line in ours] == pytest.approx([line[close] for line in theirs], rel=TOLERANCE)
    for split in ("before", "test"):
        assert report(run)[split]["loss"] == pytest.approx(report(whole)[split]["loss"], rel=TOLERANCE)


def test_two_ranks_then_one_then_three(job: list[str], whole: Path, tmp_path: Path) -> None:
    """The first are stopped and the second is killed, in the middle of the first and of the second epoch."""
    run = tmp_path / "run"
    travel(job, run, [Leg(2, "auto", stopped(5)), Leg(1, "auto", Trap("step", 12)), Leg(3, "auto")])
    check(run, whole)
    attempts = Attempts(run).read()
    assert [attempt.facts["ranks"] for attempt in attempts] == [2, 1, 3]
    assert [attempt.facts["strategy"] for attempt in attempts] == ["ddp", "single", "ddp"]
    assert [attempt.from_step for attempt in attempts][:2] == [0, 5]
    assert attempts[2].from_step in (8, 10)


@pytest.mark.slow
def test_through_all_strategies(job: list[str], whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    legs = [
        Leg(2, "ddp", stopped(2)),
        Leg(3, "fsdp", stopped(4)),
        Leg(2, "zero1", Trap("step", 7, rank=None)),
        Leg(3, "zero2", stopped(8)),
        Leg(2, "zero3", stopped(10)),
        Leg(1, "single", stopped(12)),
        Leg(2, "ddp"),
    ]
    travel(job, run, legs)
    check(run, whole)
    attempts = Attempts(run).read()
    assert [attempt.facts["strategy"] for attempt in attempts] == [leg.strategy for leg in legs]
    assert attempts[1].facts["changes"] == {"strategy.name": ["ddp", "fsdp"]}


@pytest.mark.slow
def test_ranks_that_step_alone_take_over_and_hand_back(job: list[str], whole: Path, tmp_path: Path) -> None:
    """Each sample once; what only their meetings know begins anew."""
    run, alone = tmp_path / "run", [*job, "--strategy.local_steps", "4"]
    travel(job, run, [Leg(2, "ddp", stopped(2))])
    changed = ["--checkpoint.allow_change", "strategy"]
    for ranks, trap in ((2, stopped(4)), (3, stopped(9))):
        options = [*alone, "--strategy.name", "diloco", *changed]
        assert Job(options, run, ranks, functools.partial(main, trap=trap)).wait().codes == [75] * ranks
    ended = finish([*job, "--strategy.name", "fsdp", *changed], run, 2)
    assert consumed(run) == consumed(whole), ended.text
    assert account(run).sound
    strategies = [(attempt.facts["strategy"], attempt.from_step) for attempt in Attempts(run).read()]
    assert [name for name, _ in strategies] == ["ddp", "diloco", "diloco", "fsdp"]
    assert [step for _, step in strategies[:3]] == [0, 2, 6]


def test_another_strategy_is_asked_for_by_name(job: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    travel(job, run, [Leg(2, "ddp", stopped(3))])
    ended = Job([*job, "--strategy.name", "fsdp"], run, 2).wait()
    assert ended.codes == [2, 2]
    assert "strategy.name: ddp there, fsdp now" in ended.text
