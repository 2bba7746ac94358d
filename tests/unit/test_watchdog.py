"""Runs that hang, and runs that only look as if they did: real processes, real signals, real files.

Started as a program, this file is one rank of a small run: `test_watchdog.py SCENARIO RANK SIZE FOLDER OPTIONS`.
"""

from __future__ import annotations

import ast
import ctypes
import json
import resource
import signal
import socket
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from toolkit import watchdog as module
from toolkit.errors import RESUMABLE_EXIT_CODE
from toolkit.watchdog import Watchdog, phase_limit, slow_ranks

ROOT = Path(__file__).parents[2]
FAST: dict[str, float] = {"minimum": 1.0, "interval": 0.1}
OTHER = {"attempt": 3, "rank": 1, "host": "h", "pid": 1, "created": 0.0, "tick": 5, "step": 0, "beats": 1}
OTHER |= {"phase": "step", "waited": 0.0, "limit": 1.0}
"""A heartbeat, as another rank writes it."""


# What one rank does.


class Rank:
    """A rank in a run whose collective is files: each waits until all have got to the same place."""

    def __init__(self, rank: int, size: int, folder: Path, options: dict[str, Any]) -> None:
        self.rank, self.size, self.folder = rank, size, folder
        self.watchdog = Watchdog(folder, rank=rank, size=size, **({"attempt": 3} | FAST | options))

    def step(self, step: int, busy: float = 0.02) -> None:
        self.watchdog.beat("data", step)
        time.sleep(0.002)
        self.watchdog.beat("step", step)
        time.sleep(busy)
        self.meet(step)

    def meet(self, place: object) -> None:
        meeting = self.folder / "meeting" / str(place)
        meeting.mkdir(parents=True, exist_ok=True)
        (meeting / str(self.rank)).touch()
        self.wait_in_the_collective(meeting)

    def wait_in_the_collective(self, meeting: Path) -> None:
        while not all((meeting / str(rank)).exists() for rank in range(self.size)):
            time.sleep(0.005)

    def note(self, name: str) -> None:
        """Leave the time on the clock that all processes of a host share."""
        write_whole(self.folder / name, str(time.monotonic()))


def write_whole(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def sleep_in_the_data(rank: Rank) -> None:
    for step in range(10):
        rank.step(step)
    rank.watchdog.beat("data", 10)
    if rank.rank == rank.size - 1:
        rank.note("began")
        read_a_file_that_never_comes()
    rank.watchdog.beat("step", 10)
    rank.meet(10)


def read_a_file_that_never_comes() -> None:
    time.sleep(60)


def go_on_for_ever(rank: Rank) -> None:
    for step in range(100_000):
        rank.step(step)
        if step == 30:
            rank.note(f"steady_{rank.rank}")


def long_phases(rank: Rank) -> None:
    rank.step(0, busy=1.6)  # compiles
    for step in range(1, 10):
        rank.step(step)
    for batch in range(6):
        rank.watchdog.beat("evaluation", 10)
        time.sleep(1.6 if batch == 0 else 0.01)
    for step in range(10, 16):
        rank.step(step)
        rank.watchdog.beat("saving", step)
        time.sleep(1.6 if step == 15 else 0.01)


def save_on_one_rank(rank: Rank) -> None:
    for step in range(10):
        rank.step(step)
    if rank.rank == 0:
        rank.watchdog.beat("saving", 9)
        time.sleep(0.5)
        if rank.folder.name == "locked":
            keep_the_global_lock(2.0)
        else:
            time.sleep(2.0)
    for step in range(10, 15):
        rank.step(step)


def keep_the_global_lock(seconds: float) -> None:
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def one_slow_rank(rank: Rank) -> None:
    for step in range(100):
        slow = rank.rank == 1 and step >= 20
        rank.step(step, busy=0.06 if slow else 0.02)


def forty_steps(rank: Rank) -> None:
    for step in range(40):
        rank.step(step)


def slow_by_nature(rank: Rank) -> None:
    for step in range(6):
        rank.step(step, busy=0.4)
    rank.step(6, busy=0.9)  # above the minimum, below three times 0.4 s
    rank.note("began")
    rank.step(7, busy=60)


def hang_at_different_steps(rank: Rank) -> None:
    for step in range(10):
        rank.step(step)
    rank.meet("together")
    for step in range(10, 11 + rank.rank):
        rank.watchdog.beat("step", step)
    time.sleep(60)


def fill_a_pipe_that_nobody_reads(rank: Rank) -> None:
    for step in range(10):
        rank.step(step)
    while True:
        print("x" * 10_000, file=sys.stderr)


def write_no_more(rank: Rank) -> None:
    """Every write to a file fails from here on, as on a full disk."""
    for step in range(5):
        rank.step(step)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for step in range(5, 60):
        rank.step(step)


def write_no_more_and_hang(rank: Rank) -> None:
    write_no_more(rank)
    rank.watchdog.beat("step", 60)
    read_a_file_that_never_comes()


def miss_a_real_collective(rank: Rank) -> None:
    import torch
    from torch import distributed

    store = distributed.FileStore(str(rank.folder / "store"), rank.size)
    distributed.init_process_group("gloo", rank=rank.rank, world_size=rank.size, store=store)
    for step in range(10):
        rank.watchdog.beat("step", step)
        distributed.all_reduce(torch.ones(1))
    rank.watchdog.beat("step", 10)
    if rank.rank == 1:
        rank.note("began")
        read_a_file_that_never_comes()
    distributed.all_reduce(torch.ones(1))


def rank_main(scenario: str, rank: str, size: str, folder: str, options: str) -> None:
    this = Rank(int(rank), int(size), Path(folder), json.loads(options))
    with this.watchdog:
        globals()[scenario](this)


# How a test sees a run.


class Run:
    """The processes of a run, started at once: all of its ranks, or only the first `started`."""

    def __init__(
        self, scenario: Callable[[Rank], None], size: int, folder: Path, started: int | None = None, **options: float
    ) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        end = [str(size), str(folder), json.dumps(options)]
        self.ranks = [
            subprocess.Popen(
                [sys.executable, __file__, scenario.__name__, str(rank), *end],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(started or size)
        ]

    def codes(self, timeout: float = 40) -> list[int]:
        """The exit codes; `stderr` holds what each rank said."""
        self.stderr = [rank.communicate(timeout=timeout)[1] for rank in self.ranks]
        return [rank.returncode for rank in self.ranks]

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + 30
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"{names} never came"
            time.sleep(0.02)

    def summary(self) -> dict[str, Any]:
        (alarm,) = (self.folder / "hangs").iterdir()
        loaded: dict[str, Any] = json.loads((alarm / "summary.json").read_text(encoding="utf-8"))
        assert loaded["stacks"] == str(alarm)
        return loaded

    def stacks(self, rank: int) -> str:
        (alarm,) = (self.folder / "hangs").iterdir()
        return (alarm / f"rank_{rank:05}.txt").read_text(encoding="utf-8")

    def seconds_since(self, name: str) -> float:
        return time.monotonic() - float((self.folder / name).read_text())

    def end(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()
            if rank.stderr is not None:
                rank.stderr.close()


Start = Callable[..., Run]


@pytest.fixture
def start() -> Iterator[Start]:
    runs: list[Run] = []

    def start(scenario: Callable[[Rank], None], size: int, folder: Path, **options: Any) -> Run:
        runs.append(Run(scenario, size, folder, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


def assert_no_alarm(run: Run) -> None:
    """That the run ended well, said nothing, and left neither an alarm nor a heartbeat."""
    codes = run.codes()
    assert "".join(run.stderr) == ""
    assert codes == [0] * len(run.ranks)
    assert not (run.folder / "hangs").exists()
    assert list((run.folder / "watchdog").iterdir()) == []


# Runs that hang.


def test_a_rank_that_sleeps_in_its_data_is_found(start: Start, tmp_path: Path) -> None:
    run = start(sleep_in_the_data, 2, tmp_path)
    run.wait_for("began")
    assert run.codes() == [RESUMABLE_EXIT_CODE] * 2
    assert run.seconds_since("began") < FAST["minimum"] + 2
    summary = run.summary()
    assert (summary["attempt"], summary["step"], summary["late"]) == (3, 10, [1])
    assert 1.0 <= summary["seconds_without_progress"] < 3
    first, second = summary["ranks"]
    assert (first["phase"], second["phase"], second["step"]) == ("step", "data", 10)
    assert [first["sign"], second["sign"]] == ["answered", "answered"]
    assert "wait_in_the_collective" in run.stacks(0)
    assert "read_a_file_that_never_comes" in run.stacks(1)
    assert [path.name for path in (tmp_path / "hangs").iterdir()] == ["attempt_0003_step_00000010"]
    said = "".join(run.stderr)
    assert said.count("The run hangs in step 10") == 1
    assert "late: rank 1." in said
    assert "rank 1: step 10, phase data" in said
    assert str(tmp_path / "hangs") in said


def test_a_single_process_is_found_too_and_not_an_interval_late(start: Start, tmp_path: Path) -> None:
    run = start(sleep_in_the_data, 1, tmp_path, minimum=2.0, interval=1.5)
    assert run.codes() == [RESUMABLE_EXIT_CODE]
    assert run.summary()["late"] == []
    assert 2.0 <= run.summary()["seconds_without_progress"] < 2.5
    assert "read_a_file_that_never_comes" in run.stacks(0)


def test_a_stopped_rank_is_named_and_killed(start: Start, tmp_path: Path) -> None:
    run = start(go_on_for_ever, 3, tmp_path)
    run.wait_for("steady_0", "steady_1", "steady_2")
    run.ranks[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert run.codes() == [RESUMABLE_EXIT_CODE, -signal.SIGKILL, RESUMABLE_EXIT_CODE]
    assert time.monotonic() - began < FAST["minimum"] + 3 + 2  # the limit, the grace, and a busy machine
    summary = run.summary()
    assert summary["late"] == [1]
    assert [rank["sign"] for rank in summary["ranks"]] == ["answered", "stopped or gone", "answered"]
    assert "wait_in_the_collective" in run.stacks(0)
    said = "".join(run.stderr)
    assert said.count("The run hangs") == 1
    assert "rank 1: stopped or gone (step " in said


def test_who_is_stuck_in_a_real_collective_is_found(start: Start, tmp_path: Path) -> None:
    run = start(miss_a_real_collective, 2, tmp_path)
    assert run.codes() == [RESUMABLE_EXIT_CODE] * 2
    assert "in all_reduce" in run.stacks(0)
    assert "read_a_file_that_never_comes" in run.stacks(1)


def test_ranks_that_raise_the_alarm_at_once_meet_in_one_folder(start: Start, tmp_path: Path) -> None:
    run = start(hang_at_different_steps, 2, tmp_path)
    assert run.codes() == [RESUMABLE_EXIT_CODE] * 2
    assert run.summary()["late"] == [0]
    assert "".join(run.stderr).count("The run hangs") == 1
    assert "hang_at_different_steps" in run.stacks(0)
    assert "hang_at_different_steps" in run.stacks(1)


def test_two_alarms_of_one_hang_become_one(start: Start, tmp_path: Path) -> None:
    run = start(sleep_in_the_data, 2, tmp_path)
    run.wait_for("began")
    for step in (11, 12):
        (tmp_path / f"hangs/attempt_0003_step_{step:08}").mkdir(parents=True, exist_ok=True)
    assert run.codes() == [RESUMABLE_EXIT_CODE] * 2
    assert run.summary()["stacks"].endswith("attempt_0003_step_00000011")
    assert "read_a_file_that_never_comes" in run.stacks(1)


def test_a_full_pipe_does_not_hold_it_back(start: Start, tmp_path: Path) -> None:
    (rank,) = start(fill_a_pipe_that_nobody_reads, 1, tmp_path).ranks
    assert rank.wait(15) == RESUMABLE_EXIT_CODE


def test_a_process_with_the_number_of_a_dead_rank_is_spared(start: Start, tmp_path: Path) -> None:
    innocent, meant = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    (tmp_path / "watchdog").mkdir()
    try:
        for rank, process, error in ((1, innocent, -100.0), (2, meant, 0.0)):
            created = module._created(psutil.Process(process.pid)) + error
            heartbeat = OTHER | {"rank": rank, "host": socket.gethostname(), "pid": process.pid, "created": created}
            (tmp_path / f"watchdog/rank_{rank:05}.json").write_text(json.dumps(heartbeat))
        run = start(go_on_for_ever, 3, tmp_path, started=1, patience=1.0)
        assert run.codes() == [RESUMABLE_EXIT_CODE]
        assert run.summary()["late"] == [1, 2]
        assert meant.wait(10) == -signal.SIGKILL
        assert innocent.poll() is None
    finally:
        for process in (innocent, meant):
            process.kill()
            process.wait()


# Runs that do not.


def test_long_phases_are_no_hang(start: Start, tmp_path: Path) -> None:
    assert_no_alarm(start(long_phases, 2, tmp_path))


@pytest.mark.parametrize("name", ["free", "locked"])
def test_saving_on_one_rank_is_no_hang_of_the_others(start: Start, tmp_path: Path, name: str) -> None:
    assert_no_alarm(start(save_on_one_rank, 2, tmp_path / name))


def test_a_rank_three_times_as_slow_is_no_hang(start: Start, tmp_path: Path) -> None:
    assert_no_alarm(start(one_slow_rank, 2, tmp_path, minimum=0.5))


def test_a_run_that_was_stopped_and_goes_on_is_no_hang(start: Start, tmp_path: Path) -> None:
    run = start(forty_steps, 2, tmp_path)
    run.wait_for("meeting/10/0", "meeting/10/1")
    for rank in run.ranks:
        rank.send_signal(signal.SIGSTOP)
    time.sleep(3)
    for rank in run.ranks:
        rank.send_signal(signal.SIGCONT)
    assert_no_alarm(run)


def test_what_an_earlier_attempt_left_is_ignored(start: Start, tmp_path: Path) -> None:
    (tmp_path / "hangs/attempt_0002_step_00000007").mkdir(parents=True)
    (tmp_path / "watchdog").mkdir()
    path = tmp_path / "watchdog/rank_00001.json"
    watchdog = Watchdog(tmp_path, rank=0, size=2, attempt=3)
    path.write_text(json.dumps(OTHER | {"attempt": 2}))
    assert watchdog._others() == {}
    path.write_text(json.dumps(OTHER))
    assert watchdog._others()[1].position == (0, 1)
    path.write_text("not ours")
    assert watchdog._others() == {}
    run = start(forty_steps, 1, tmp_path)
    assert run.codes() == [0]


def test_the_limit_follows_the_steps(start: Start, tmp_path: Path) -> None:
    run = start(slow_by_nature, 1, tmp_path, minimum=0.6)
    assert run.codes() == [RESUMABLE_EXIT_CODE]
    assert (tmp_path / "began").exists(), "the step of 0.9 s was taken for a hang"
    (rank,) = run.summary()["ranks"]
    assert 3 * 0.9 <= rank["limit"] < 3 * 0.9 + 1.5
    assert rank["limit"] <= rank["waited"] < rank["limit"] + 1


# When nothing can be written.


def test_a_run_without_a_place_for_its_heartbeat_goes_on(start: Start, tmp_path: Path) -> None:
    (tmp_path / "watchdog").write_text("in the way")
    run = start(forty_steps, 1, tmp_path)
    assert run.codes() == [0]
    assert run.stderr[0].count("cannot write its heartbeat") == 1


def test_a_full_disk_does_not_end_a_run(start: Start, tmp_path: Path) -> None:
    run = start(write_no_more, 1, tmp_path)
    assert run.codes() == [0]
    assert run.stderr[0].count("cannot write its heartbeat") == 1
    assert "File too large" in run.stderr[0]


def test_a_hang_on_a_full_disk_is_told_on_the_screen(start: Start, tmp_path: Path) -> None:
    run = start(write_no_more_and_hang, 1, tmp_path)
    assert run.codes() == [RESUMABLE_EXIT_CODE]
    assert "Rank 0 hangs: step 60, phase step" in run.stderr[0]
    assert "in read_a_file_that_never_comes" in run.stderr[0]


# Its parts.


def test_limits() -> None:
    def limit(phase: str, durations: list[float]) -> float:
        return phase_limit(phase, durations, 10.0, 3.0, 600.0)

    assert limit("step", [1.0] * 4) == 600
    assert limit("step", [1.0] * 5) == 10
    assert limit("step", [5.0] * 5) == 15
    assert limit("step", [60.0] + [1.0] * 98) == 180
    assert limit("step", [60.0] + [1.0] * 99) == 10  # one of a hundred is beyond the 99th percentile
    assert limit("saving", [1.0] * 50) == 600
    assert limit("saving", [300.0] * 50) == 900


def test_slow_ranks() -> None:
    assert slow_ranks([]) == []
    assert slow_ranks([5.0]) == []
    assert slow_ranks([1.0, 1.1, 0.9, 2.5]) == [3]
    assert slow_ranks([1.0, 1.9]) == []
    assert slow_ranks([3.0, 1.0]) == [0]
    assert slow_ranks([1.0, 1.0, 4.0, 4.0], factor=5.0) == []
    assert slow_ranks([0.0, 0.0, 0.0]) == []


def test_a_beat_costs_microseconds(tmp_path: Path) -> None:
    with Watchdog(tmp_path, rank=0, size=1, attempt=0, interval=0.05) as watchdog:
        seconds = min(timeit.repeat(lambda: watchdog.beat("step", 7), number=10_000, repeat=5)) / 10_000
        time.sleep(0.5)
    assert seconds < 5e-6
    assert len(watchdog._durations["step"]) == module.WINDOW


def test_only_the_monotonic_clock_is_read() -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _root(node) == "time"}
    assert names == {"monotonic", "sleep"}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert "time" in imported
    assert "datetime" not in imported
    assert not {"st_mtime", "getmtime"} & {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def _root(node: ast.Attribute) -> str:
    return node.value.id if isinstance(node.value, ast.Name) else ""


def test_it_does_not_wait_for_torch() -> None:
    code = "import sys, toolkit.watchdog; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"]


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
