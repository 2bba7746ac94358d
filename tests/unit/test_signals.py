"""Wishes to stop: real signals to real processes, some of them blocked in C code, some of them orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.processes import alive
from toolkit.signals import LAUNCHER_HAS_ENDED, SAME_WISH, SIGNALS, StopRequest

ROOT = Path(__file__).resolve().parents[2]
TRAINING = """
    import os, sys, time
    from toolkit.signals import StopRequest
    with StopRequest() as stop:
        print("ready", flush=True)
        deadline = time.monotonic() + 20
        while not stop.reason and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(float(sys.argv[1]))  # the rest of the step
        print(stop.reason or "nobody", flush=True)
    sys.exit(7)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of a test, of which none outlives it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start(
    started: list[subprocess.Popen[str]], script: str, *arguments: object, alone: bool = False
) -> subprocess.Popen[str]:
    """A Python process that has said that it is ready; `alone` in a process group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=alone,
        preexec_fn=heard,
    )
    started.append(process)
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first == "ready\n", first + process.stdout.read()
    return process


def heard() -> None:
    """No signal is ignored, as SIGINT would be where these tests run in the background of a script."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def rest(process: subprocess.Popen[str], timeout: float = 10) -> tuple[int, str]:
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.05)


# The first wish, and the second


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_is_only_noted(started: list[subprocess.Popen[str]], number: signal.Signals) -> None:
    process = start(started, TRAINING, 0.3)
    process.send_signal(number)
    assert rest(process) == (7, f"{number.name}\n")


def test_the_same_wish_twice(started: list[subprocess.Popen[str]]) -> None:
    process = start(started, TRAINING, SAME_WISH + 1)
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.5)
    assert rest(process) == (7, "SIGINT\n")


def test_what_was_ignored_stays_ignored(started: list[subprocess.Popen[str]]) -> None:
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + textwrap.dedent(TRAINING)  # nohup
    process = start(started, script, 0)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    assert rest(process) == (7, "SIGUSR1\n")


def test_whoever_has_decided_to_end_hears_no_more(started: list[subprocess.Popen[str]]) -> None:
    script = (
        textwrap.dedent(TRAINING) + "from toolkit.signals import ignore_all; ignore_all(); print('ready', flush=True)"
    )
    script = script.replace("sys.exit(7)", "") + "; time.sleep(1); sys.exit(7)"
    process = start(started, script, 0)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["SIGTERM\n", "ready\n"]
    for number in SIGNALS:
        process.send_signal(number)
    assert rest(process) == (7, "")


def test_other_signals_are_no_wishes(started: list[subprocess.Popen[str]]) -> None:
    script = TRAINING.replace("import os", "import signal; signal.signal(signal.SIGUSR2, print); import os")
    process = start(started, script, SAME_WISH + 0.5)
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(SAME_WISH + 0.2)
    process.send_signal(signal.SIGUSR2)
    code, out = rest(process)
    assert (code, out.splitlines()[-1]) == (7, "SIGTERM")


def test_the_second_ends_a_rank_that_waits_for_others(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    script = """
        import sys, time
        import torch.distributed as dist
        from toolkit.signals import StopRequest
        rank = int(sys.argv[2])
        dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
        with StopRequest():
            print("ready", flush=True)
            time.sleep(60) if rank else dist.barrier()
    """
    processes: list[subprocess.Popen[str]] = []
    threads = [
        threading.Thread(target=lambda rank=rank: processes.append(start(started, script, tmp_path / "store", rank)))
        for rank in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waiting = next(process for process in processes if process.args[-1] == "0")  # type: ignore[index]
    time.sleep(0.5)
    waiting.send_signal(signal.SIGUSR1)
    time.sleep(SAME_WISH + 0.3)
    assert waiting.poll() is None
    sent = time.monotonic()
    waiting.send_signal(signal.SIGTERM)
    code, out = rest(waiting)
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM" in out
    assert time.monotonic() - sent < 1


# The launcher's death


def launcher(script: str, file: Path, *arguments: object) -> str:
    """A process that starts a training whose output goes to `file`, and waits for it."""
    child = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return f"""
        import subprocess, time
        process = subprocess.Popen({child!r}, stdout=open({str(file)!r}, "w"))
        while not open({str(file)!r}).read():
            time.sleep(0.05)
        print("ready", flush=True)
        print(process.pid, flush=True)
        process.wait()
    """


def orphan(started: list[subprocess.Popen[str]], script: str, file: Path) -> int:
    """The process of a training whose launcher was killed."""
    parent = start(started, launcher(script, file, 0.2))
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    return pid


def test_the_death_of_the_launcher(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    pid = orphan(started, TRAINING, tmp_path / "out")
    wait_until_gone(pid)
    assert (tmp_path / "out").read_text() == f"ready\n{LAUNCHER_HAS_ENDED}\n"


def test_the_end_of_a_shell_is_no_wish(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    script = TRAINING.replace("StopRequest()", "StopRequest(launched=False)").replace("+ 20", "+ 2")
    pid = orphan(started, script, tmp_path / "out")
    wait_until_gone(pid)
    assert (tmp_path / "out").read_text() == "ready\nnobody\n"


# Leaving no trace


def test_what_was_there_before_is_put_back() -> None:
    def own(number: int, frame: object) -> None:
        """A handler of the program around."""

    before = signal.signal(signal.SIGUSR1, own)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    earlier = signal.set_wakeup_fd(writer)
    threads = threading.active_count()
    try:
        handlers = [signal.getsignal(number) for number in SIGNALS]
        with StopRequest() as stop:
            assert own not in [signal.getsignal(number) for number in SIGNALS]
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
            assert stop.reason == "SIGUSR1"
        assert [signal.getsignal(number) for number in SIGNALS] == handlers
        assert threading.active_count() == threads
        assert signal.set_wakeup_fd(earlier) == writer
        assert stop.reason == "SIGUSR1"
    finally:
        signal.set_wakeup_fd(earlier)
        signal.signal(signal.SIGUSR1, before)
        os.close(reader)
        os.close(writer)


def test_in_another_thread_nothing_happens() -> None:
    handlers = [signal.getsignal(number) for number in SIGNALS]
    seen: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.extend([stop.reason, [signal.getsignal(number) for number in SIGNALS]])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["", handlers]


# Helpers that are forked meanwhile


def test_the_end_of_a_helper_is_no_wish(started: list[subprocess.Popen[str]]) -> None:
    script = """
        import multiprocessing, signal, sys, time
        from toolkit.signals import StopRequest

        def with_a_handler(seconds):
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(3))
            time.sleep(seconds)

        with StopRequest() as stop:
            context = multiprocessing.get_context("fork")
            helpers = [context.Process(target=target, args=(30,)) for target in (time.sleep, with_a_handler)]
            for helper in helpers:
                helper.start()
            time.sleep(0.3)
            print("ready", flush=True)
            for helper in helpers:
                helper.terminate()
                helper.join()
            time.sleep(0.2)
            print([helper.exitcode for helper in helpers], repr(stop.reason))
    """
    assert rest(start(started, script)) == (0, "[-15, 3] ''\n")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_helpers_outlive_a_signal_to_the_group(started: list[subprocess.Popen[str]], number: signal.Signals) -> None:
    script = """
        import multiprocessing, time
        from toolkit.signals import StopRequest
        with StopRequest() as stop:
            helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1,))
            helper.start()
            print("ready", flush=True)
            helper.join()
            print(helper.exitcode, stop.reason)
    """
    process = start(started, script, alone=True)
    os.killpg(process.pid, number)
    assert rest(process) == (0, f"0 {number.name}\n")


LOADING = """
    import sys, time
    from torch.utils.data import DataLoader
    from toolkit.signals import StopRequest, as_helper
    with StopRequest() as stop:
        options = dict(num_workers=1, multiprocessing_context=sys.argv[1], worker_init_fn=as_helper)
        loader = iter(DataLoader(range(10**6), **options))
        next(loader)
        print("ready", flush=True)
        while not stop.reason:
            next(loader)
        for _ in range(100):  # the rest of the step
            next(loader)
        print(stop.reason, flush=True)
"""


@pytest.mark.parametrize(
    ("number", "context"),
    [(signal.SIGTERM, "fork"), (signal.SIGUSR1, "fork"), (signal.SIGTERM, "spawn")],
    ids=lambda value: getattr(value, "name", value),
)
def test_workers_of_a_loader_outlive_it_too(
    started: list[subprocess.Popen[str]], number: signal.Signals, context: str
) -> None:
    process = start(started, LOADING, context, alone=True)
    workers = [child.pid for child in psutil.Process(process.pid).children()]
    assert workers
    os.killpg(process.pid, number)
    assert rest(process, timeout=20) == (0, f"{number.name}\n")
    for worker in workers:
        wait_until_gone(worker)
