"""A run that was killed or stopped goes on as if nothing had happened: bit for bit, sample for sample."""

from __future__ import annotations

import functools
import hashlib
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

from tests.faults.jobs import Ended, Job, Reference, curves, differences, figures, finish, report, said
from tests.faults.trapped import BREAK, Trap, main
from tests.ranks import RankFailed, on_ranks
from tests.recipes.launching import recipe
from toolkit.checkpoint.account import account
from toolkit.checkpoint.attempts import Attempts

EPOCH, STEPS = 7, 16
SOME = [Trap("step", 5), Trap("logged", EPOCH), Trap("validation", 2), Trap("step", STEPS), Trap("model")]
EVERYWHERE = [
    Trap("setup"),
    Trap("base"),
    Trap("baseline", 2),
    Trap("step", 2),  # before the first checkpoint
    Trap("step", 5),
    Trap("logged", EPOCH),
    Trap("validation", 2),
    Trap("step", 10),
    Trap("step", STEPS),
    Trap("logged", STEPS),
    Trap("test", 2),
    Trap("model"),
    Trap("finished"),
]
TERM = signal.SIGTERM


@pytest.fixture
def job(tiny_job: list[str]) -> list[str]:
    """16 steps in epochs of 7, with dropout, several micro-batches and several batches in an evaluation."""
    return [
        *(*tiny_job, "--model.dropout", "0.1", "--train.steps", str(STEPS)),
        *("--train.micro_batch", "2", "--train.eval_batch", "4"),
        *("--checkpoint.every", "3", "--checkpoint.crash_limit", "99"),
    ]


def spring(trap: Trap, options: Sequence[str], run: Path, ranks: int = 1) -> Ended:
    """Run into a trap; whom it hit, and how the others ended."""
    ended = Job(options, run, ranks, functools.partial(main, trap=trap)).wait()
    hit = range(ranks) if trap.rank is None and trap.place not in ("setup", "base", "model") else [trap.rank or 0]
    if trap.signal == signal.SIGKILL:
        assert [ended.codes[rank] for rank in hit] == [-signal.SIGKILL] * len(hit), ended.text
        assert all(ended.codes), "the others cannot end as if all was well"
    return ended


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and digest of each file, without the lock and the lease.

    A start copies what is appended to, so that no former holder of the lease has it open: its time does not count.
    """
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns if path.suffix != ".jsonl" or path.parent != folder else 0,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and path.parent.name != ".lease"
    }


def check_bits(
    job: list[str], reference: Reference, tmp_path: Path, traps: Sequence[Trap], ranks: int, *more: str
) -> Path:
    """Through all these traps, one after the other, and to the end: as without them."""
    options, run = [*job, *more], tmp_path / "run"
    for trap in traps:
        spring(trap, options, run, ranks)
    finish(options, run, ranks)
    assert differences(run, reference(options, ranks)) == []
    return run


@pytest.mark.parametrize(("name", "ranks"), [("single", 1), pytest.param("ddp", 2, marks=pytest.mark.slow)])
def test_killed_at_every_place(name: str, ranks: int, job: list[str], reference: Reference, tmp_path: Path) -> None:
    run = check_bits(job, reference, tmp_path, EVERYWHERE, ranks, "--strategy.name", name)
    steps = [attempt.from_step for attempt in Attempts(run).read()]
    assert steps == sorted(steps)
    assert steps[:5] == [0, 0, 0, 0, 0]
    assert steps[-1] == STEPS
    assert len(set(steps)) > 4, "it went on from checkpoints"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "precision"),
    [
        *((name, 2, "fp32") for name in ("fsdp", "zero1", "zero2", "zero3")),
        *((name, 2, "bf16") for name in ("ddp", "fsdp", "zero3")),
        *((name, 3, "fp32") for name in ("fsdp", "zero2")),
        ("ddp", 3, "fp32"),
    ],
)
def test_killed_under_each_strategy(
    name: str, ranks: int, precision: str, job: list[str], reference: Reference, tmp_path: Path
) -> None:
    check_bits(job, reference, tmp_path, SOME, ranks, "--strategy.name", name, "--precision", precision)


@pytest.mark.slow
def test_killed_and_stopped_between_meetings(job: list[str], reference: Reference, tmp_path: Path) -> None:
    """Ranks that hold different weights are not saved: a signal waits for their meeting, as an evaluation brings it."""
    # They meet after 4, at the epoch's end, and so on: after steps 4, 7, 11, 14 and 16.
    traps = [Trap("step", 6), Trap("step", 9, rank=1, signal=TERM), Trap("step", 13), Trap("model")]
    run = check_bits(job, reference, tmp_path, traps, 2, "--strategy.name", "diloco", "--strategy.local_steps", "4")
    attempts = Attempts(run).read()
    assert attempts[1].reached == 11
    assert {attempt.from_step for attempt in attempts} <= {0, 4, 7, 11, 14, 16}


def test_one_rank_is_killed_and_the_others_do_not_wait(job: list[str], reference: Reference, tmp_path: Path) -> None:
    traps = [Trap("step", 5, rank=1), Trap("step", 9, rank=0), Trap("validation", 1, rank=1)]
    check_bits(job, reference, tmp_path, traps, 2, "--strategy.name", "ddp")


def test_with_workers_of_the_loader(job: list[str], reference: Reference, tmp_path: Path) -> None:
    """They change no number, so the run without them is the measure."""
    run, workers = tmp_path / "run", ["--data.workers", "2"]
    single = [*job, "--strategy.name", "single"]
    spring(Trap("step", 5), [*single, *workers], run)
    finish([*single, *workers], run)
    assert differences(run, reference(single)) == []


@pytest.mark.slow
def test_the_loss_scale_of_fp16(job: list[str], reference: Reference, tmp_path: Path) -> None:
    options = ("--precision", "fp16", "--strategy.name", "single")
    run = check_bits(job, reference, tmp_path, [Trap("step", 5), Trap("step", 10)], 1, *options)
    assert all(line["loss_scale"] > 1 for line in figures(run))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("single", 1), ("ddp", 2)])
def test_stopped_with_an_evaluation_pending(
    name: str, ranks: int, job: list[str], reference: Reference, tmp_path: Path
) -> None:
    """Stopped by a signal to the last rank alone: no step is lost, and what was due is made up for."""
    options, run, last = [*job, "--strategy.name", name], tmp_path / "run", ranks - 1
    places = [
        ("baseline", 1),
        ("step", EPOCH),
        ("validation", 1),
        ("step", EPOCH + 2),
        ("step", STEPS),
        ("validation", 1),
        ("test", 1),
    ]
    for place, number in places:
        ended = spring(Trap(place, number, last, TERM), options, run, ranks)
        assert ended.codes == [75] * ranks, ended.text
        assert report(run)["status"] == "interrupted"
    finish(options, run, ranks)
    assert differences(run, reference(options, ranks)) == []
    steps = [(attempt.from_step, attempt.reached) for attempt in Attempts(run).read()]
    assert steps == [(0, 0), (0, 7), (7, 7), (7, 9), (9, 16), (16, 16), (16, 16), (16, 16)]


@pytest.mark.parametrize("keep", [1, pytest.param(9, marks=pytest.mark.slow)])
def test_best_weights_and_early_stopping_survive(
    keep: int, job: list[str], reference: Reference, tmp_path: Path
) -> None:
    options = [
        *(*job, "--strategy.name", "single", "--optim.lr", "0.1", "--train.steps", "40"),
        *("--run.eval_every", "4", "--run.early_stopping", "2", "--checkpoint.keep_best", "True"),
        *("--checkpoint.every", "2"),
    ]
    whole, kept = reference(options), ["--checkpoint.keep", str(keep)]
    losses = [evaluation["loss"] for evaluation in report(whole)["evaluations"]]
    best = 4 * losses.index(min(losses)) + 4
    assert 4 < best < report(whole)["steps"] < 40, "the best is in the middle, and it stops early"
    run = tmp_path / "run"
    for trap in (
        Trap("step", best, signal=TERM),  # the next attempt makes the evaluation that finds the best
        Trap("step", best + 2),
        Trap("validation", 1),
        Trap("step", report(whole)["steps"]),
        Trap("test", 1),  # with the best weights in force
    ):
        spring(trap, [*options, *kept], run)
    ended = finish([*options, *kept], run)
    assert f"the weights of step {best}" in said(ended.text)
    assert differences(run, whole) == []


def test_a_finished_run_says_so_and_does_nothing(job: list[str], reference: Reference, tmp_path: Path) -> None:
    options = [*job, "--strategy.name", "single"]
    run = reference(options)
    before = contents(run)
    ended = finish(options, run)
    assert "is finished: there is nothing to do" in ended.text
    assert contents(run) == before


def test_a_run_that_was_finished_trains_on_after_a_kill(job: list[str], reference: Reference, tmp_path: Path) -> None:
    steady = [*job, "--strategy.name", "single", "--optim.schedule", "constant", "--optim.warmup_steps", "0"]
    steady += ["--run.eval_every", "5"]
    run, on = tmp_path / "run", ["--checkpoint.allow_change", "train.steps"]
    short = [*steady, "--train.steps", "10"]
    finish(short, run)
    refused = Job(steady, run).wait()
    assert refused.codes == [2]
    assert "train.steps: 10 there, 16 now" in said(refused.text)
    assert "--checkpoint.allow_change train.steps" in said(refused.text)
    spring(Trap("step", 12), [*steady, *on], run)
    finish([*steady, *on], run)
    assert differences(run, reference(steady)) == []
    less = Job([*short, *on], run).wait()
    assert less.codes == [2]
    assert "has taken 16 steps" in said(less.text)


def test_other_settings_are_refused_key_by_key(job: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    spring(Trap("step", 5), job, run)
    before = contents(run)
    other = [*job, "--optim.lr", "1e-4", "--train.global_batch", "24", "--run.seed", "1"]
    for ranks in (1, 2):
        ended = Job(other, run, ranks).wait()
        assert ended.codes == [2] * ranks
        for key in ("optim.lr: 0.001 there, 0.0001 now", "train.global_batch: 12 there, 24", "run.seed: 0 there, 1"):
            assert key in said(ended.text)
    assert contents(run) == before


def test_other_data_are_refused(job: list[str], reference: Reference, texts_csv: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.csv"
    data.write_text(texts_csv.read_text())
    options, run = [*job, "--strategy.name", "single", "--data.name", str(data)], tmp_path / "run"
    spring(Trap("step", 5, signal=TERM), options, run)
    before = contents(run)
    data.write_text(texts_csv.read_text().replace("team", "side", 1))
    ended = Job(options, run).wait()
    assert ended.codes == [2]
    assert "the data are no longer those" in said(ended.text)
    assert contents(run) == before
    data.write_text(texts_csv.read_text())
    finish(options, run)
    assert differences(run, reference([*job, "--strategy.name", "single"])) == []


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [(signal.SIGKILL, -signal.SIGKILL, "its processes were killed"), (BREAK, 1, "broken in step 5")],
)
def test_the_same_crash_again_and_again_is_refused(
    number: int, code: int, reason: str, job: list[str], tmp_path: Path
) -> None:
    run, options = tmp_path / "run", [*job, "--checkpoint.crash_limit", "3", "--checkpoint.asynchronous", "False"]
    for step in (2, 5, 5, 5):  # the first is another one
        assert spring(Trap("step", step, signal=number), options, run).codes == [code]
    before = contents(run)
    refused = Job(options, run).wait()
    assert refused.codes == [2]
    assert "has crashed 3 times in a row after step 4" in said(refused.text)
    assert reason in said(refused.text)
    assert contents(run) == before
    finish([*options, "--checkpoint.crash_limit", "4"], run)
    assert account(run).sound


def test_runs_without_a_name(job: list[str], tmp_path: Path) -> None:
    """The same command goes on with its run, wherever that stands among others; other settings begin another one."""
    other = [*job, "--optim.lr", "1e-4"]
    for options in (job, other):
        with pytest.raises(RankFailed, match="died"):
            on_ranks(recipe, 1, options, str(tmp_path), functools.partial(main, trap=Trap("step", 5)))
    runs = tmp_path / "runs" / "bert_cls"
    for options, name in ((job, "001"), (other, "002")):
        assert on_ranks(recipe, 1, options, str(tmp_path))[0][0] == 0
        assert report(runs / name)["attempts"] == 2
        assert account(runs / name).sound
    code, text = on_ranks(recipe, 1, job, str(tmp_path))[0]
    assert code == 0
    assert "runs/bert_cls/001 is finished" in said(text)
    assert sorted(path.name for path in runs.iterdir()) == ["001", "002"]
    assert figures(runs / "001") != figures(runs / "002")


@pytest.mark.parametrize(
    "traps",
    [
        pytest.param([Trap("step", 6), Trap("step", 12)], id="after a checkpoint"),
        pytest.param([Trap("step", 2)], id="before the first"),
    ],
)
def test_the_curve_of_a_tracker_has_each_step_once(
    traps: list[Trap], job: list[str], reference: Reference, tmp_path: Path
) -> None:
    options = [*job, "--strategy.name", "single", "--run.trackers", "tensorboard"]
    run = check_bits(options, reference, tmp_path, traps, 1)
    assert curves(run) == curves(reference(options))


def test_two_that_begin_one_run_at_once(job: list[str], tmp_path: Path) -> None:
    """The one that had to wait for the lock does not begin it once more."""
    run = tmp_path / "run"
    run.mkdir()
    with FileLock(run / ".lock"):
        late = Job(job, run)
        time.sleep(2)  # it has seen an empty folder, and waits
        (run / "config.yaml").write_text("")
    ended = late.wait()
    assert ended.codes == [2]
    assert "another process has begun a run" in said(ended.text)
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.yaml"]
