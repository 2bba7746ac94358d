"""Losses that must not be learnt from: the run stops and says why, or goes back and leaves the samples out."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.jobs import Ended, Job, curves, differences, figures, finish, report, said
from tests.faults.trapped import Poison, Trap, main
from tests.parity.state import joined
from toolkit.checkpoint.account import account
from toolkit.checkpoint.attempts import Attempts
from toolkit.checkpoint.store import Store

EPOCH = 7
NO_TRAP = Trap()
OVERFLOW = 2e37
"""Times a loss: that is still finite, and the norm of its gradient is not."""

Dealt = Mapping[int, Mapping[int, list[int]]]
"""Step, rank: samples."""
Deal = Callable[..., Dealt]

AT_ONCE = [("single", 1, math.nan), ("ddp", 2, math.inf)]
LATER = [
    *(("single", 1, factor) for factor in (math.inf, OVERFLOW)),
    *((name, 2, factor) for name in ("fsdp", "zero2") for factor in (math.nan, OVERFLOW)),
    *(("ddp", 2, OVERFLOW), ("zero1", 2, OVERFLOW), ("zero3", 2, math.nan)),
]
EACH = [*AT_ONCE, *(pytest.param(*case, marks=pytest.mark.slow) for case in LATER)]


@pytest.fixture
def job(tiny_job: list[str]) -> list[str]:
    """One epoch, so that a sample comes once; saved after steps 2, 4, 6 and 7."""
    return [*tiny_job, "--model.dropout", "0.1", "--train.steps", str(EPOCH), "--checkpoint.every", "2"]


@pytest.fixture(scope="module")
def deal(tmp_path_factory: pytest.TempPathFactory) -> Deal:
    """Which samples the ranks have in a step, by the ledger of a run that nothing happens to."""
    found: dict[int, Dealt] = {}

    def by_ledger(job: list[str], ranks: int) -> Dealt:
        if ranks not in found:
            run = tmp_path_factory.mktemp("dealt") / "run"
            finish([*job, "--train.steps", str(4 * EPOCH)], run, ranks)
            found[ranks] = dealt(run)
        return found[ranks]

    return by_ledger


def dealt(run: Path, attempt: int = 1) -> Dealt:
    steps: dict[int, dict[int, list[int]]] = {}
    for path in sorted((run / "samples" / f"attempt_{attempt:04d}").glob("rank_*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            steps.setdefault(line["step"], {})[int(path.stem[5:])] = line["ids"]
    return steps


def start(options: list[str], run: Path, ranks: int, poison: Poison, trap: Trap = NO_TRAP) -> Ended:
    return Job(options, run, ranks, functools.partial(main, poison=poison, trap=trap)).wait()


def tensors(run: Path) -> dict[int, dict[str, np.ndarray[Any, Any]]]:
    return {step: joined(path) for step, path in Store(run).committed()}


def check_finite(run: Path) -> None:
    saved = tensors(run)
    assert saved
    assert all(np.isfinite(tensor).all() for found in saved.values() for tensor in found.values())


def check_left_out(run: Path, options: list[str], ranks: int, steps: list[int], given: Dealt) -> None:
    """Exactly these steps were left out, with their samples, and all is as if they never had been taken."""
    reasons = {int(step): reason for step, reason in report(run)["left_out"].items()}
    assert list(reasons) == steps
    accounted = account(run)
    assert sorted(sample for _, sample, _ in accounted.skipped) == sorted(
        sample for step in steps for ids in given[step].values() for sample in ids
    )
    assert {reason for _, _, reason in accounted.skipped} == set(reasons.values())
    lines = {line["step"]: line for line in figures(run)}
    assert [step for step, line in lines.items() if "left_out" in line] == steps
    whole = run.parent / "whole"
    ended = start(options, whole, ranks, Poison(left_out=reasons))
    assert ended.codes == [0] * ranks, ended.text
    assert differences(run, whole) == []
    check_finite(run)


def why(factor: float) -> str:
    return "the gradient norm is" if factor == OVERFLOW else f"the loss is {factor}"


@pytest.mark.parametrize(("name", "ranks", "factor"), EACH)
def test_back_to_the_checkpoint_and_past_the_samples(
    name: str, ranks: int, factor: float, job: list[str], deal: Deal, tmp_path: Path
) -> None:
    given, last, run = deal(job, ranks), ranks - 1, tmp_path / "run"
    options = [*job, "--strategy.name", name, "--train.on_fault", "rewind"]
    ended = start(options, run, ranks, Poison({given[5][last][2]: factor}))
    assert ended.codes == [0] * ranks, ended.text
    reason = report(run)["left_out"]["5"]
    assert reason.startswith(why(factor) if ranks == 1 or factor != math.inf else "the loss is")
    assert "at step 5" in reason
    assert f"rank {last}: samples {given[5][last]}" in reason
    assert ("rank 0" in reason) == (ranks == 1 or factor == OVERFLOW), "the rank at fault is named, where it is known"
    assert f"{reason}: back to step 4; the samples of step 5 are left out" in said(ended.texts[0])
    attempts = Attempts(run).read()
    assert [(a.from_step, a.reached, a.status) for a in attempts] == [(0, 4, "rewound"), (4, 7, "finished")]
    check_left_out(run, options, ranks, [5], given)


@pytest.mark.parametrize(("name", "ranks", "factor"), EACH)
def test_stop_names_step_rank_and_samples(
    name: str, ranks: int, factor: float, job: list[str], deal: Deal, tmp_path: Path
) -> None:
    given, last, run = deal(job, ranks), ranks - 1, tmp_path / "run"
    ended = start([*job, "--strategy.name", name], run, ranks, Poison({given[5][last][2]: factor}))
    assert ended.codes == [2] * ranks, ended.text
    for expected in (why(factor), "at step 5", f"rank {last}: samples {given[5][last]}", "--train.on_fault rewind"):
        assert expected in said(ended.texts[0])
    assert [line["step"] for line in figures(run)] == [1, 2, 3, 4]
    assert (report(run)["status"], report(run)["steps"]) == ("failed", 4)
    assert f"rank {last}: samples {given[5][last]}" in report(run)["error"]
    assert Store(run).committed()[0][0] == 4
    check_finite(run)
    assert account(run).sound
    # Whoever asks for it now goes on past the samples.
    options = [*job, "--strategy.name", name, "--train.on_fault", "rewind"]
    allowed = [*options, "--checkpoint.allow_change", "train.on_fault"]
    ended = start(allowed, run, ranks, Poison({given[5][last][2]: factor}))
    assert ended.codes == [0] * ranks, ended.text
    assert list(report(run)["left_out"]) == ["5"]


def test_again_before_a_new_checkpoint_leaves_out_all_steps_since(job: list[str], deal: Deal, tmp_path: Path) -> None:
    given, run = deal(job, 1), tmp_path / "run"
    options = [*job, "--strategy.name", "single", "--train.on_fault", "rewind", "--checkpoint.every", "100"]
    poison = Poison({given[3][0][0]: math.nan, given[5][0][1]: math.inf})
    ended = start(options, run, 1, poison)
    assert ended.codes == [0], ended.text
    assert "the samples of steps 1 to 5 are left out" in said(ended.text)
    assert ["nan" in reason for reason in report(run)["left_out"].values()] == [False, False, True, False, False]
    assert [a.status for a in Attempts(run).read()] == ["rewound", "rewound", "finished"]
    check_left_out(run, options, 1, [1, 2, 3, 4, 5], given)


def test_again_after_a_new_checkpoint_leaves_out_that_step_alone(job: list[str], deal: Deal, tmp_path: Path) -> None:
    given, run = deal(job, 1), tmp_path / "run"
    options = [*job, "--strategy.name", "single", "--train.on_fault", "rewind", "--run.trackers", "tensorboard"]
    options += ["--data.workers", "1"]
    ended = start(options, run, 1, Poison({given[3][0][0]: math.nan, given[6][0][1]: math.nan}))
    assert ended.codes == [0], ended.text
    assert [step for step, _ in curves(run)["train/loss"]] == [1, 2, 4, 5, 7], "what was undone is hidden"
    check_left_out(run, options, 1, [3, 6], given)


def test_the_last_step_of_the_epoch_and_of_the_run_is_left_out(job: list[str], deal: Deal, tmp_path: Path) -> None:
    """What is due after it is done all the same."""
    given, run = deal(job, 1), tmp_path / "run"
    options = [*job, "--strategy.name", "single", "--train.on_fault", "rewind"]
    assert start(options, run, 1, Poison({given[7][0][0]: math.nan})).codes == [0]
    check_left_out(run, options, 1, [7], given)
    assert [evaluation["step"] for evaluation in report(run)["evaluations"]] == [7]


def test_a_kill_between_the_rewind_and_the_next_checkpoint(job: list[str], deal: Deal, tmp_path: Path) -> None:
    given, run = deal(job, 1), tmp_path / "run"
    options = [*job, "--strategy.name", "single", "--train.on_fault", "rewind"]
    poison = Poison({given[5][0][0]: math.nan})
    assert start(options, run, 1, poison, Trap("step", 6)).codes == [-9]
    assert start(options, run, 1, poison, Trap("step", 7)).codes == [-9]
    assert start(options, run, 1, poison).codes == [0]
    check_left_out(run, options, 1, [5], given)


@pytest.mark.parametrize(("name", "ranks"), [("ddp", 2)])
def test_too_many_rewinds_stop_the_run(name: str, ranks: int, job: list[str], deal: Deal, tmp_path: Path) -> None:
    given, run = deal(job, ranks), tmp_path / "run"
    options = [*job, "--strategy.name", name, "--train.on_fault", "rewind", "--train.max_rewinds", "1"]
    ended = start(options, run, ranks, Poison({given[3][0][0]: math.nan, given[6][1][0]: math.nan}))
    assert ended.codes == [2] * ranks
    assert "at step 6" in said(ended.texts[0])
    assert "after 1 rewinds" in said(ended.texts[0])
    assert report(run)["status"] == "failed"
    assert list(report(run)["left_out"]) == ["3"]
    assert account(run).sound
    check_finite(run)


def test_a_spike_is_one_by_the_losses_before_a_kill(job: list[str], deal: Deal, tmp_path: Path) -> None:
    """It takes twenty losses to compare with, which the process that meets the spike has not seen itself."""
    given, run = deal(job, 1), tmp_path / "run"
    options = [*job, "--strategy.name", "single", "--train.steps", "28", "--train.on_fault", "rewind"]
    options += ["--train.spike", "10"]
    poison = Poison({given[25][0][0]: 10.0}, from_step=22)
    assert start(options, run, 1, poison, Trap("step", 24)).codes == [-9]
    assert start(options, run, 1, poison).codes == [0]
    assert "the loss is a spike" in report(run)["left_out"]["25"]
    check_left_out(run, options, 1, [25], given)


def test_no_spike_without_a_threshold(job: list[str], deal: Deal, tmp_path: Path) -> None:
    given = deal(job, 1)
    options = [*job, "--strategy.name", "single", "--train.steps", "28", "--train.on_fault", "rewind"]
    assert start(options, tmp_path / "run", 1, Poison({given[25][0][0]: 10.0}, from_step=22)).codes == [0]
    assert report(tmp_path / "run")["left_out"] == {}


@pytest.mark.parametrize("fault", ["stop", "rewind"])
@pytest.mark.parametrize(
    ("name", "ranks"), [("single", 1), *(pytest.param(n, 2, marks=pytest.mark.slow) for n in ("ddp", "fsdp", "zero2"))]
)
def test_a_rate_that_overflows(name: str, ranks: int, fault: str, job: list[str], tmp_path: Path) -> None:
    """The real thing: the first step throws the weights so far that no loss is finite any more."""
    run, rates = tmp_path / "run", ["--optim.lr", "1e30", "--optim.warmup_steps", "0"]
    options = [*job, "--strategy.name", name, *rates, "--train.on_fault", fault, "--checkpoint.every", "1"]
    ended = Job(options, run, ranks).wait()
    assert ended.codes == [2] * ranks, ended.text
    assert "NumericsError" in ended.texts[0]
    assert "at step" in said(ended.texts[0])
    if fault == "rewind":
        assert "after 3 rewinds" in said(ended.texts[0])
    if Store(run).committed():
        check_finite(run)


def test_weights_that_are_not_finite_are_not_saved(job: list[str], tmp_path: Path) -> None:
    """A rate beyond fp32: the loss was fine, and what it led to is not."""
    run, rates = tmp_path / "run", ["--optim.lr", "1e39", "--optim.warmup_steps", "0"]
    ended = Job([*job, "--strategy.name", "single", *rates, "--checkpoint.every", "1"], run).wait()
    assert ended.codes == [2]
    assert "NumericsError" in ended.text
    assert Store(run).committed() == []
    assert not (run / "model").exists()


def test_unfit_samples_are_left_out_named_and_counted(job: list[str], deal: Deal, tmp_path: Path) -> None:
    given, run, two = deal(job, 2), tmp_path / "run", ["--strategy.name", "ddp", "--train.steps", "10"]
    unfit = (given[2][1][0], given[3][0][1], given[3][1][1])
    options = [*job, *two, "--data.max_bad_rows", "3"]
    ended = start(options, run, 2, Poison(unfit=unfit), Trap("step", 5))
    assert ended.codes == [-9, -9]
    ended = start(options, run, 2, Poison(unfit=unfit))
    assert ended.codes == [0, 0], ended.text
    assert report(run)["bad_rows"] == 3
    accounted = account(run)
    assert accounted.sound
    again = [sample for sample in unfit for step in (8, 9, 10) if any(sample in ids for ids in given[step].values())]
    assert sorted(sample for _, sample, _ in accounted.skipped) == sorted([*unfit, *again])
    assert {reason for _, _, reason in accounted.skipped} == {"token id 1000000 is not among the model's 48"}
    assert start(options, tmp_path / "whole", 2, Poison(unfit=unfit)).codes == [0, 0]
    assert differences(run, tmp_path / "whole") == []


def test_too_many_unfit_samples_stop_all_ranks(job: list[str], deal: Deal, tmp_path: Path) -> None:
    given, run = deal(job, 2), tmp_path / "run"
    unfit = (given[2][1][0], given[3][1][1])
    options = [*job, "--strategy.name", "ddp", "--data.max_bad_rows", "1"]
    ended = start(options, run, 2, Poison(unfit=unfit))
    assert ended.codes == [2, 2]
    assert all("DataError" in text for text in ended.texts)
    assert f"2 training samples are unfit, the last at step 3: sample {unfit[1]}: token id 1000000" in said(ended.text)
    assert report(run)["status"] == "failed"


def test_who_raises_the_cap_goes_on(job: list[str], deal: Deal, tmp_path: Path) -> None:
    given, run = deal(job, 2), tmp_path / "run"
    poison = Poison(unfit=(given[2][1][0], given[3][1][1]))
    options = [*job, "--strategy.name", "ddp", "--data.max_bad_rows", "1"]
    assert start(options, run, 2, poison).codes == [2, 2]
    more = [*job, "--strategy.name", "ddp", "--data.max_bad_rows", "2"]
    ended = start(more, run, 2, poison)
    assert ended.codes == [0, 0], ended.text
    assert report(run)["bad_rows"] == 2
    assert account(run).sound
