"""A rank that stops or sleeps is named, with the stacks of all, and the run can go on; one that is slow is spared."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.jobs import Ended, Job, Reference, differences, finish
from tests.faults.trapped import Naps, Trap, main
from tests.recipes.launching import ROOT
from toolkit.checkpoint import saver
from toolkit.checkpoint.attempts import Attempts, ledgers
from toolkit.errors import RESUMABLE_EXIT_CODE
from toolkit.strategies.state import FlatShard
from toolkit.watchdog import ENOUGH

STOP, KILL = signal.SIGSTOP, signal.SIGKILL
HANGS = RESUMABLE_EXIT_CODE
LIMIT = 2.0
"""Seconds without progress, in most of these runs."""
STEPS = 16


@pytest.fixture
def job(tiny_job: list[str]) -> list[str]:
    """16 steps in epochs of 7, under a watchdog with little patience."""
    return [
        *(*tiny_job, "--train.steps", str(STEPS), "--train.eval_batch", "2"),
        *("--checkpoint.every", "3", "--run.hang_seconds", str(LIMIT)),
    ]


def spring(trap: Trap, options: Sequence[str], run: Path, ranks: int = 2) -> Ended:
    return Job(options, run, ranks, functools.partial(main, trap=trap)).wait()


def summary(run: Path) -> dict[str, Any]:
    """Of the only hang; its folder holds nothing but it and stacks."""
    (folder,) = (run / "hangs").iterdir()
    assert {path.suffix for path in folder.iterdir()} == {".json", ".txt"}
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    assert Path(found["stacks"]).name == folder.name
    return found


def stacks(run: Path, rank: int) -> str:
    (path,) = (run / "hangs").glob(f"*/rank_{rank:05}.txt")
    return path.read_text()


def check_going_on(options: Sequence[str], run: Path, reference: Path, ranks: int = 2) -> None:
    finish(options, run, ranks)
    assert differences(run, reference) == []
    assert [attempt.status for attempt in Attempts(run).read()] == ["killed", "finished"]


def sample_of(run: Path, step: int, rank: int) -> int:
    """One that this rank consumes in this step."""
    lines = map(json.loads, ledgers(run, 1)[rank].read_text().splitlines())
    return next(int(line["ids"][0]) for line in lines if line["step"] == step)


# Runs that hang


@pytest.mark.slow
@pytest.mark.parametrize(
    "trap",
    [
        Trap("step", 9, 1, STOP),
        Trap("step", 12, 0, STOP),
        Trap("validation", 4, 1, STOP),
        Trap("logged", 9, 0, STOP),  # it has begun to save
        Trap("test", 3, 1, STOP),
    ],
    ids=lambda trap: f"{trap.place}-{trap.rank}",
)
def test_a_stopped_rank(trap: Trap, job: list[str], reference: Reference, tmp_path: Path) -> None:
    run, other = tmp_path / "run", 1 - (trap.rank or 0)
    ended = spring(trap, job, run)
    assert [ended.codes[trap.rank or 0], ended.codes[other]] == [-KILL, HANGS], ended.text
    found = summary(run)
    assert found["late"] == [trap.rank]
    assert found["ranks"][trap.rank]["sign"] == "stopped or gone"
    assert found["ranks"][other]["sign"] == "answered"
    assert found["seconds_without_progress"] >= LIMIT
    assert "toolkit/engine.py" in stacks(run, other) or "toolkit/world.py" in stacks(run, other)
    check_going_on(job, run, reference(job, 2))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_asleep_in_its_data(workers: int, job: list[str], reference: Reference, tmp_path: Path) -> None:
    run, options = tmp_path / "run", [*job, "--data.workers", str(workers)]
    sample = sample_of(reference(job, 2), 9, 1)
    one = Job(options, run, 2, functools.partial(main, trap=Naps(naps={("data", sample, 1): 120.0})))
    one.until_step(8)
    family = [child for rank in one.ranks for child in psutil.Process(rank.pid).children()]
    assert len(family) == 2 * workers
    ended = one.wait()
    assert ended.codes == [HANGS, HANGS], ended.text
    found = summary(run)
    assert found["late"] == [1]
    assert [(rank["step"], rank["phase"]) for rank in found["ranks"]] == [(9, "step"), (9, "data")]
    assert ("pass_by" if not workers else "_try_get_data") in stacks(run, 1)
    assert "all_reduce" in stacks(run, 0)
    assert not psutil.wait_procs(family, timeout=15)[1], "workers are left"
    check_going_on(options, run, reference(job, 2))


@pytest.mark.slow
def test_a_process_alone(job: list[str], reference: Reference, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = spring(Naps(naps={("step", 9, 0): 120.0}), job, run, 1)
    assert ended.codes == [HANGS]
    assert summary(run)["late"] == []
    assert "pass_by" in stacks(run, 0)
    check_going_on(job, run, reference(job), 1)


@pytest.mark.slow
def test_how_long_it_takes_by_default(tiny_job: list[str], tmp_path: Path) -> None:
    one = Job([*tiny_job, "--train.steps", "100000", "--run.eval_every", "1000"], tmp_path / "run", 2)
    one.until_step(30)
    one.kill(1, number=STOP)
    stopped = time.monotonic()
    assert one.wait().codes == [HANGS, -KILL]
    took = time.monotonic() - stopped
    print(f"ended {took:.1f} s after a rank was stopped")
    assert 10 <= took < 25
    assert summary(tmp_path / "run")["late"] == [1]


# Runs that do not


@pytest.mark.slow
def test_what_takes_its_time_is_no_hang(job: list[str], reference: Reference, tmp_path: Path) -> None:
    """The first step, each of many batches of an evaluation, and writing the model, on one rank or the other."""
    naps = {("step", 1, 1): 2 * LIMIT, ("validation", 0, 0): 0.3 * LIMIT, ("base", 1, 0): LIMIT, ("model", 1, 0): LIMIT}
    naps |= {("test", 0, 1): 0.3 * LIMIT}
    ended = spring(Naps(naps=naps | {("model", 1, 0): 2 * LIMIT}), job, tmp_path / "run")
    assert ended.codes == [0, 0], ended.text
    assert not (tmp_path / "run" / "hangs").exists()
    assert differences(tmp_path / "run", reference(job, 2)) == []


@pytest.mark.slow
def test_a_slow_rank_is_named_and_spared(tiny_job: list[str], tmp_path: Path) -> None:
    """One rank takes three times as long as a usual step, a hundred times."""
    run, steps = tmp_path / "run", 100
    options = [*tiny_job, "--train.steps", str(steps), "--run.eval_every", str(steps), "--run.hang_seconds", str(LIMIT)]
    ended = spring(Naps(naps={("step", 0, 1): 0.07}), options, run)
    assert ended.codes == [0, 0], ended.text
    assert not (run / "hangs").exists()
    assert "rank 1 is slow: 0." in ended.text
    assert "rank 0 is slow" not in ended.text


@pytest.mark.slow
def test_no_rank_is_slow_where_all_are_alike(tiny_job: list[str], tmp_path: Path) -> None:
    options = [*tiny_job, "--train.steps", "100", "--run.eval_every", "100", "--run.hang_seconds", str(LIMIT)]
    ended = spring(Naps(naps={("step", 0, 0): 0.07, ("step", 0, 1): 0.07}), options, tmp_path / "run")
    assert ended.codes == [0, 0], ended.text
    assert "is slow" not in ended.text


def on_a_slow_disk(config: Any) -> None:
    """The recipe, where each save takes longer than a step may."""
    write = saver.write_tensors

    def slowly(folder: Path, shards: Mapping[str, FlatShard], rank: int) -> dict[str, tuple[int, str]]:
        time.sleep(1.5 * LIMIT)
        return write(folder, shards, rank)

    saver.write_tensors = slowly
    main(config, Trap())


@pytest.mark.slow
def test_a_save_that_takes_longer_than_any_step_may(job: list[str], reference: Reference, tmp_path: Path) -> None:
    """Training waits for each save, often enough to know what is usual."""
    run, options = tmp_path / "run", [*job, "--checkpoint.asynchronous", "False", "--checkpoint.every", "2"]
    finish(options, run, 1, on_a_slow_disk)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum(later["seconds"] - sooner["seconds"] > LIMIT for sooner, later in pairwise(lines)) > ENOUGH
    assert not (run / "hangs").exists()
    assert differences(run, reference(options, 1)) == []


@pytest.mark.slow
def test_the_watch_can_be_switched_off(job: list[str], reference: Reference, tmp_path: Path) -> None:
    options = [*job, "--run.hang_seconds", "None"]
    ended = spring(Naps(naps={("step", 9, 1): 16.0}), options, tmp_path / "run")  # the default allows 10
    assert ended.codes == [0, 0], ended.text
    assert differences(tmp_path / "run", reference(job, 2)) == []


@pytest.mark.parametrize("minimum", ["3.0", "math.inf"])
def test_phases_with_little_history_get_what_all_get(minimum: str, tmp_path: Path) -> None:
    """`patience` is no limit to what the settings allow."""
    script = f"""
        import math, sys, time
        from pathlib import Path
        from toolkit.watchdog import Watchdog
        options = dict(rank=0, size=1, attempt=1, minimum={minimum}, patience=0.5, interval=0.1)
        with Watchdog(Path(sys.argv[1]), **options) as watchdog:
            time.sleep(1)
            watchdog.beat("saving", 1)
            time.sleep(1)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == 0
