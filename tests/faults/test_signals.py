"""Whoever asks a run to stop, whenever and however often: it stops after the step it is in, and not one is lost."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.jobs import Ended, Job, Reference, curve, differences, finish, last_step
from tests.faults.trapped import Naps, Trap, main
from tests.processes import alive
from tests.recipes.launching import RECIPE, ROOT, environment, start
from toolkit.checkpoint import saver
from toolkit.checkpoint.attempts import Attempts
from toolkit.checkpoint.store import Store
from toolkit.errors import RESUMABLE_EXIT_CODE, USER_ERROR_EXIT_CODE
from toolkit.signals import SAME_WISH
from toolkit.strategies.state import FlatShard

TERM, INT, USR1, HUP, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGKILL
STOPPED = RESUMABLE_EXIT_CODE
EPOCH, STEPS = 7, 16
PROMPTLY = 20.0
"""Seconds from a signal to the end of the last process, most of which it takes to draw the report."""


@pytest.fixture
def job(tiny_job: list[str]) -> list[str]:
    """16 steps in epochs of 7, with dropout, several micro-batches and several batches in an evaluation."""
    return [
        *(*tiny_job, "--model.dropout", "0.1", "--train.steps", str(STEPS)),
        *("--train.micro_batch", "1", "--train.eval_batch", "4"),
    ]


@pytest.fixture
def long_job(tiny_job: list[str]) -> list[str]:
    """Some seconds of steps."""
    return [*tiny_job, "--train.steps", "200", "--run.eval_every", "50"]


def check_no_step_is_lost(run: Path, reference: Path) -> None:
    """Each attempt but the last was stopped, and the next went on after the very step that it had reached."""
    attempts = Attempts(run).read()
    assert [attempt.status for attempt in attempts] == ["interrupted"] * (len(attempts) - 1) + ["finished"]
    assert [attempt.ended_at for attempt in attempts[:-1]] == [attempt.from_step for attempt in attempts[1:]]
    assert [attempt.reached for attempt in attempts] == [attempt.ended_at for attempt in attempts]
    assert curve(run) == curve(reference)
    assert differences(run, reference) == []


def check_saved(run: Path, ended: Ended) -> None:
    assert ended.codes == [STOPPED] * len(ended.codes), ended.text
    assert "Traceback" not in ended.text
    step = last_step(run)
    assert [number for number, _ in Store(run).committed()][:1] == [step][:step]
    assert Store(run).unfinished() == []
    if step:
        assert f"the same command goes on from step {step}" in ended.text


def spring(trap: Trap, options: Sequence[str], run: Path, ranks: int = 1) -> Ended:
    return Job(options, run, ranks, functools.partial(main, trap=trap)).wait()


# In the middle of whatever it does

PLACES = {
    1: [
        Trap("baseline", 1, signal=INT),
        Trap("step", 3, signal=TERM),  # in the last of several micro-batches
        Trap("validation", 1, signal=USR1),
        Trap("test", 2, signal=HUP),
    ],
    2: [
        Trap("baseline", 1, 0, TERM),
        Trap("step", 1, 1, USR1),
        Trap("logged", 3, 0, INT),
        Trap("step", EPOCH, 0, HUP),  # with an evaluation to follow
        Trap("validation", 1, 1, TERM),
        Trap("step", 12, None, USR1),
        Trap("step", STEPS, 1, INT),
        Trap("test", 1, 1, TERM),
    ],
}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_in_every_place(ranks: int, job: list[str], reference: Reference, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for trap in PLACES[ranks]:
        check_saved(run, spring(trap, job, run, ranks))
    ended = spring(Trap("model", 1, 0, TERM), job, run, ranks)
    assert ended.codes == [0] * ranks, "too late to stop: all that is left is to save the model"
    check_no_step_is_lost(run, reference(job, ranks))


@dataclass(frozen=True)
class WhileSaving(Trap):
    """A trap that springs while a slow disk still writes the checkpoint of the step before."""

    def pass_by(self, place: str, number: int, rank: int) -> None:
        here = (place, rank) == (self.place, self.rank)
        if here and number == self.number - 1:
            write = saver.write_tensors

            def slowly(folder: Path, shards: Mapping[str, FlatShard], rank: int) -> dict[str, tuple[int, str]]:
                if f"step_{number:08d}" in folder.name:  # and not the one before, which may not have begun
                    assert SPRUNG.wait(60)
                return write(folder, shards, rank)

            saver.write_tensors = slowly
        if here and number == self.number:
            deadline = time.monotonic() + 60
            while not list(Path("run/checkpoints").glob(f".writing_step_{number - 1:08d}_*")):
                assert time.monotonic() < deadline
        super().pass_by(place, number, rank)
        if here and number == self.number:
            SPRUNG.set()


SPRUNG = threading.Event()


@pytest.mark.slow
def test_stopped_while_a_save_is_under_way(job: list[str], reference: Reference, tmp_path: Path) -> None:
    options = [*job, "--checkpoint.every", "1"]
    run = tmp_path / "run"
    for trap in (WhileSaving("step", 3, 1, TERM), WhileSaving("step", 6, 0, USR1)):
        check_saved(run, spring(trap, options, run, 2))
        assert [step for step, _ in Store(run).committed()] == [trap.number, trap.number - 1], "both are whole"
    finish(options, run, 2)
    check_no_step_is_lost(run, reference(options, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "zero1", "zero3"])
def test_stopped_under_each_strategy(name: str, job: list[str], reference: Reference, tmp_path: Path) -> None:
    run, options = tmp_path / "run", [*job, "--strategy.name", name]
    for trap in (Trap("step", 3, 1, TERM), Trap("validation", 1, 0, USR1), Trap("test", 1, 1, TERM)):
        check_saved(run, spring(trap, options, run, 2))
    finish(options, run, 2)
    check_no_step_is_lost(run, reference(options, 2))


# From outside, to some or all ranks

SOME = [(USR1, (1,))]
ALL = [(number, ranks) for number in (TERM, INT, USR1, HUP) for ranks in ((), (0,), (1,))]


@pytest.mark.parametrize("ways", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_stopped_from_outside(ways: Any, long_job: list[str], reference: Reference, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number, ranks in ways:
        one = Job(long_job, run, 2)
        one.until_step(last_step(run) + 3)
        sent = time.monotonic()
        one.kill(*ranks, number=number)
        check_saved(run, one.wait())
        assert time.monotonic() - sent < PROMPTLY
    finish(long_job, run, 2)
    check_no_step_is_lost(run, reference(long_job, 2))


@pytest.mark.slow
def test_the_same_wish_twice_while_it_is_being_granted(
    long_job: list[str], reference: Reference, tmp_path: Path
) -> None:
    """A terminal's Ctrl-C reaches the ranks, and once more through the launcher: they have saved by then, or not."""
    run = tmp_path / "run"
    one = Job(long_job, run, 2)
    one.until_step(3)
    sent = time.monotonic()
    one.kill(number=INT)
    one.until(lambda: '"interrupted"' in (run / "attempts.jsonl").read_text())
    one.kill(number=INT)
    one.kill(number=TERM)
    late = time.monotonic() - sent
    if late > SAME_WISH:
        pytest.skip(f"it took {late:.1f} s to save")
    check_saved(run, one.wait())
    finish(long_job, run, 2)
    check_no_step_is_lost(run, reference(long_job, 2))


def test_a_second_wish_ends_at_once(job: list[str], reference: Reference, tmp_path: Path) -> None:
    """One rank is asleep, and another waits for it in a collective."""
    run, options = tmp_path / "run", [*job, "--checkpoint.every", "2"]
    one = Job(options, run, 2, functools.partial(main, trap=Naps(naps={("step", 4, 1): 20.0})))
    one.until_step(3)
    time.sleep(0.5)
    one.kill(number=TERM)
    time.sleep(SAME_WISH + 0.3)
    assert all(rank.is_alive() for rank in one.ranks)
    sent = time.monotonic()
    one.kill(number=USR1)
    assert one.wait().codes == [128 + USR1] * 2
    assert time.monotonic() - sent < 2
    finish(options, run, 2)
    assert [attempt.from_step for attempt in Attempts(run).read()] == [0, 2]
    assert differences(run, reference(options, 2)) == []


def test_before_there_is_anything_to_save(long_job: list[str], reference: Reference, tmp_path: Path) -> None:
    """While processes start, connect and open their folder, a signal ends them as it ends any other.

    Once the attempt has begun it is noted, and none of these counts as a crash, however often they come.
    """
    run = tmp_path / "run"
    for seconds, number in ((0.1, TERM), (0.5, INT), (1.0, TERM)):
        one = Job(long_job, run, 2)
        time.sleep(seconds)
        sent = time.monotonic()
        one.kill(number=number)
        assert 0 not in one.wait(timeout=PROMPTLY).codes
        assert time.monotonic() - sent < PROMPTLY
    for number, rank in ((TERM, 0), (INT, 1), (HUP, None), (USR1, 0)):
        check_saved(run, spring(Trap("setup", 1, rank, number), long_job, run, 2))
    assert {attempt.status for attempt in Attempts(run).read()} == {"interrupted"}
    finish(long_job, run, 2)
    assert differences(run, reference(long_job, 2)) == []


# Without a reader, a parent, a place of one's own


def speak_into(writer: Any, options: list[str], cwd: str) -> None:
    """The recipe, with its output in a pipe."""
    import torch

    from recipes import bert_cls
    from toolkit.start import start as start_recipe

    torch.set_num_threads(1)
    for descriptor in (1, 2):
        os.dup2(writer.fileno(), descriptor)
    writer.close()
    os.chdir(cwd)
    sys.argv = [str(RECIPE), *options]
    start_recipe(bert_cls.main, bert_cls.Config, "")


@pytest.mark.slow
def test_whoever_reads_the_output_may_leave_first(long_job: list[str], reference: Reference, tmp_path: Path) -> None:
    """`… | tee log` and Ctrl-C: `tee` is gone before the run has saved, and while it says so."""
    context, run = multiprocessing.get_context("forkserver"), tmp_path / "run"
    for number in (INT, None):
        reader, writer = context.Pipe(duplex=False)
        argv = [*long_job, "--run.dir", "run"]
        process = context.Process(target=speak_into, args=(writer, argv, str(tmp_path)))
        process.start()
        writer.close()
        output = b""
        while b"step   " not in output:
            output += os.read(reader.fileno(), 1000)
        reader.close()
        if number is not None:
            os.kill(process.pid or 0, number)
        process.join(60)
        assert process.exitcode == (0 if number is None else STOPPED)
        assert Store(run).committed()[0][0] == last_step(run)
    check_no_step_is_lost(run, reference(long_job))


def test_a_launcher_that_ended_before_the_run_began(tmp_path: Path) -> None:
    """A rank that has prepared its data looks for the parent that it had then."""
    script = """
        import pathlib, sys, time
        from toolkit.signals import StopRequest
        stop, folder = StopRequest(), pathlib.Path(sys.argv[1])
        (folder / "ready").touch()
        while not (folder / "go").exists():
            time.sleep(0.05)
        with stop:
            time.sleep(2)
            (folder / "reason").write_text(stop.reason)
    """
    child = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess; subprocess.run({child!r})"], cwd=ROOT)
    wait_until((tmp_path / "ready").exists)
    parent.kill()
    parent.wait()
    (tmp_path / "go").touch()
    wait_until((tmp_path / "reason").exists)
    assert (tmp_path / "reason").read_text() == "the launcher has ended"


@pytest.mark.slow
def test_the_end_of_a_shell_is_no_wish(long_job: list[str], reference: Reference, tmp_path: Path) -> None:
    """And after `nohup`, neither is the end of the terminal."""
    command = f"nohup {sys.executable} {RECIPE} {' '.join(long_job)} --run.dir run > out 2>&1 & echo $!"
    shell = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env=environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    process = psutil.Process(int(shell.stdout))
    wait_until(lambda: last_step(tmp_path / "run") >= 3)
    process.send_signal(HUP)
    wait_until_gone([process], 90)
    assert differences(tmp_path / "run", reference(long_job)) == []
    assert len(Attempts(tmp_path / "run").read()) == 1


@pytest.mark.slow
def test_a_folder_has_one_writer(job: list[str], reference: Reference, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = Job(job, run, 2, functools.partial(main, trap=Naps(naps={("step", 4, 1): 45.0})))
    first.until_step(3)
    second = Job([*job, "--run.hang_seconds", "None"], run, 2).wait()
    assert second.codes == [USER_ERROR_EXIT_CODE] * 2
    assert "another process is writing to" in second.text
    assert first.wait().codes == [0, 0]
    assert differences(run, reference(job, 2)) == []


def test_a_port_that_is_taken(job: list[str], tmp_path: Path) -> None:
    """The rank that was to open it says so; those that wait for it behind another's door are the launcher's to end."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        one = Job(job, tmp_path / "run", 2, port=other.getsockname()[1])
        one.until(lambda: not one.ranks[0].is_alive())
        one.kill(1)
        ended = one.wait()
    assert ended.codes == [USER_ERROR_EXIT_CODE, -KILL]
    assert "EADDRINUSE" in ended.texts[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_rank_that_is_late(job: list[str], reference: Reference, tmp_path: Path) -> None:
    finish(job, tmp_path / "run", 2, late)
    assert differences(tmp_path / "run", reference(job, 2)) == []


def late(config: Any) -> None:
    if os.environ["RANK"] == "0":
        time.sleep(20)
    main(config)


@pytest.mark.slow
def test_the_newest_is_told_by_its_step(job: list[str], reference: Reference, tmp_path: Path) -> None:
    """Clocks that were set back and forth leave times in the files that say nothing."""
    run, options = tmp_path / "run", [*job, "--checkpoint.every", "3"]
    check_saved(run, spring(Trap("logged", 11, signal=TERM), options, run))
    now = time.time()
    for hours, (_, folder) in zip((-1, +1), Store(run).committed(), strict=True):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (now + 3600 * hours,) * 2)
    finish(options, run)
    check_no_step_is_lost(run, reference(options))


# Through the launcher


@pytest.mark.parametrize(
    ("config", "number", "more"),
    [
        ("cpu1", KILL, []),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("cpu2", TERM, []),
                ("cpu2", USR1, []),
                ("cpu2", KILL, []),
                ("cpu2", HUP, []),
                ("cpu1", TERM, []),
                ("cpu2", TERM, ["--data.workers", "1"]),
            )
        ),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_signal_to_the_launcher(
    config: str, number: signal.Signals, more: list[str], long_job: list[str], reference: Reference, tmp_path: Path
) -> None:
    """It passes the signal on, or dies of it: the ranks save all the same, and nobody is left."""
    run, ranks = tmp_path / "run", int(config[-1])
    process = start([*long_job, *more, "--run.dir", "run"], config=config, cwd=tmp_path)
    with ended_in_any_case(process) as family:
        wait_until(lambda: last_step(run) >= 3 or process.poll() is not None)
        family += psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 1 + ranks
        process.send_signal(number)
        wait_until_gone(family, PROMPTLY)
        text, _ = process.communicate(timeout=5)
    assert process.returncode != 0
    step = last_step(run)
    assert Store(run).committed()[0][0] == step, text
    assert f"the same command goes on from step {step}" in text
    finish(long_job, run, ranks)
    check_no_step_is_lost(run, reference(long_job, ranks))


@contextlib.contextmanager
def ended_in_any_case(process: subprocess.Popen[str]) -> Iterator[list[psutil.Process]]:
    """The process and those that the block adds."""
    family = [psutil.Process(process.pid)]
    try:
        yield family
    finally:
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.communicate()


def wait_until(condition: Callable[[], Any], timeout: float = 90) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s in vain"
        time.sleep(0.01)


def wait_until_gone(processes: Sequence[psutil.Process], timeout: float) -> None:
    wait_until(lambda: not any(map(alive, processes)), timeout)
