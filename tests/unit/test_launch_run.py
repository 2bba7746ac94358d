"""`python -m launch run`: real launches whose ranks end, are stopped, are killed, and meet through sockets."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launch.run import several_nodes, verdict
from tests.processes import alive
from tests.ranks import free_port
from tests.recipes.launching import environment
from toolkit.environment import report_exit_code

ROOT = Path(__file__).resolve().parents[2]
ONE, TWO = "cpu1", "cpu2"

LEAVES = """
    import os, sys, time
    from pathlib import Path
    from toolkit.environment import rank_name, report_exit_code

    def leave(code):
        report_exit_code(code)
        sys.exit(code)

    rank, folder = rank_name(), Path(__file__).parent
    (folder / f"pid_{rank}_{os.getpid()}").touch()
"""
ENDS = (
    LEAVES
    + """
    what = sys.argv[1 + int(rank)]
    if what == "killed":
        os.kill(os.getpid(), 9)
    if what != "waits":
        leave(int(what))
    time.sleep(60)
"""
)
STOPS = (
    LEAVES
    + """
    from toolkit.signals import StopRequest
    with StopRequest() as stop:
        (folder / f"ready_{rank}").touch()
        deadline = time.monotonic() + 60
        while not stop.reason and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(float(sys.argv[1]))  # the step, and the saving
        (folder / f"saved_{rank}").write_text(stop.reason)
    leave(75)
"""
)
TRAINS = (
    LEAVES
    + """
    import torch, torch.distributed as dist
    attempt = len(list(folder.glob(f"pid_{rank}_*")))
    dist.init_process_group("gloo")
    for step in range(10):
        dist.all_reduce(torch.ones(1))
        if (attempt, rank, step) == (1, "1", 5):
            os.kill(os.getpid(), 9)
    dist.barrier()
    report_exit_code(0)
    os._exit(0)  # gloo's threads may abort an ordinary exit
"""
)


class Job:
    """A `launch run`, with a folder in which its ranks leave traces."""

    def __init__(self, folder: Path, script: str, *arguments: object, config: str | None = TWO, own: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        (folder / "script.py").write_text(textwrap.dedent(script), encoding="utf-8")
        file = ["--config_file", str(ROOT / f"configs/accelerate/{config}.yaml")] if config else []
        command = [sys.executable, "-m", "launch", "run", *own.split(), "--", *file]
        if config is None:
            command += map(str, arguments)
            arguments = ()
        self.process = subprocess.Popen(
            [*command, str(folder / "script.py"), *map(str, arguments)],
            cwd=ROOT,
            env=environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, pattern: str, number: int) -> None:
        """Until the ranks have left so many traces."""
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob(pattern))) < number:
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> int:
        """The exit code, once it has ended and all of its ranks."""
        code = self.process.wait(timeout=60)
        assert self.alive() == []
        return code

    def alive(self) -> list[int]:
        pids = [int(file.name.split("_")[2]) for file in self.folder.glob("pid_*")]
        return [pid for pid in pids if alive(pid)]

    def launcher(self) -> psutil.Process:
        """The process of `accelerate launch`."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def saved(self) -> list[str]:
        return [file.read_text() for file in sorted(self.folder.glob("saved_*"))]

    def output(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.read()


def wait_until(fact: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts jobs of which nothing outlives the test."""
    jobs: list[Job] = []

    def start(*arguments: object, **options: object) -> Job:
        jobs.append(Job(tmp_path / f"job{len(jobs)}", *arguments, **options))  # type: ignore[arg-type]
        return jobs[-1]

    yield start
    for one in jobs:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(one.process.pid).children(recursive=True):
                child.kill()
        one.process.kill()
        one.process.communicate()
        for pid in one.alive():
            os.kill(pid, signal.SIGKILL)


# The exit code


@pytest.mark.parametrize(
    ("codes", "ended_well", "asked", "code"),
    [
        (set(), True, False, 0),  # a script that leaves no code
        ({0}, True, True, 0),
        (set(), False, False, 1),
        ({0}, False, False, 1),  # the others were killed
        ({2}, False, False, 2),
        ({75}, False, False, 75),
        ({0, 75}, False, False, 75),
        ({2, 75}, False, False, 2),
        ({1, 2}, False, False, 1),
        ({1, 75}, False, True, 1),
        ({130}, False, False, 1),
        ({0}, False, True, 0),  # the signal came after the last step
        (set(), False, True, 75),
    ],
)
def test_the_verdict(codes: set[int], ended_well: bool, asked: bool, code: int) -> None:
    assert verdict(codes, ended_well, asked) == code


@pytest.mark.parametrize(
    ("config", "ends", "code"),
    [
        (TWO, ("2", "waits"), 2),
        (TWO, ("75", "75"), 75),
        (ONE, ("75",), 75),
        pytest.param(TWO, ("0", "0"), 0, marks=pytest.mark.slow),
        pytest.param(TWO, ("waits", "killed"), 1, marks=pytest.mark.slow),
    ],
)
def test_the_exit_code_is_the_recipes(job: Callable[..., Job], config: str, ends: tuple[str, ...], code: int) -> None:
    assert job(ENDS, *ends, config=config).end() == code


def test_exit_codes_go_nowhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TOOLKIT_EXIT_CODES", raising=False)
    report_exit_code(75)
    monkeypatch.setenv("TOOLKIT_EXIT_CODES", str(tmp_path / "missing"))
    report_exit_code(75)
    assert list(tmp_path.iterdir()) == []


# Signals


@pytest.mark.parametrize(
    ("config", "number", "reason"),
    [
        (TWO, signal.SIGUSR1, "SIGUSR1"),
        (ONE, signal.SIGUSR1, "SIGUSR1"),
        pytest.param(TWO, signal.SIGTERM, "SIGTERM", marks=pytest.mark.slow),
        pytest.param(TWO, signal.SIGINT, "SIGINT", marks=pytest.mark.slow),
        pytest.param(TWO, signal.SIGHUP, "SIGHUP", marks=pytest.mark.slow),
        pytest.param(ONE, signal.SIGTERM, "SIGTERM", marks=pytest.mark.slow),
        pytest.param(ONE, signal.SIGINT, "SIGINT", marks=pytest.mark.slow),
    ],
)
def test_signals_reach_all_ranks(job: Callable[..., Job], config: str, number: signal.Signals, reason: str) -> None:
    ranks = 2 if config == TWO else 1
    one = job(STOPS, 0.5, config=config, own="--restarts 3")
    one.wait_for("ready_*", ranks)
    one.process.send_signal(number)
    assert one.end() == 75
    assert len(one.saved()) == ranks
    # With one rank accelerate dies, and on a busy machine its rank notices that before the signal comes.
    assert set(one.saved()) <= {reason} | ({"the launcher has ended"} if config == ONE else set())
    assert len(list(one.folder.glob("pid_*"))) == ranks  # who is stopped is not started again
    assert "Traceback" not in one.output()


@pytest.mark.slow
def test_a_signal_to_all_processes_at_once(job: Callable[..., Job]) -> None:
    one = job(STOPS, 1)  # as a scheduler sends it
    one.wait_for("ready_*", 2)
    family = psutil.Process(one.process.pid)
    for process in [family, *family.children(recursive=True)]:
        process.send_signal(signal.SIGUSR1)
    assert one.end() == 75
    assert len(one.saved()) == 2
    assert set(one.saved()) <= {"SIGUSR1", "SIGTERM"}  # accelerate makes a second one SIGTERM


def test_the_grace_ends(job: Callable[..., Job]) -> None:
    one = job(STOPS, 60, own="--grace 1")
    one.wait_for("ready_*", 2)
    sent = time.monotonic()
    one.process.send_signal(signal.SIGTERM)
    assert one.end() == 75
    assert one.saved() == []
    assert time.monotonic() - sent < 8


@pytest.mark.slow
def test_a_second_signal_ends_all_at_once(job: Callable[..., Job]) -> None:
    one = job(STOPS, 60)
    one.wait_for("ready_*", 2)
    one.process.send_signal(signal.SIGINT)
    time.sleep(2.3)
    assert len(one.alive()) == 2
    sent = time.monotonic()
    one.process.send_signal(signal.SIGINT)
    assert one.end() == 130
    assert time.monotonic() - sent < 2


@pytest.mark.slow
def test_what_srun_is_told(job: Callable[..., Job], tmp_path: Path) -> None:
    """Not that the run is to go on: a node whose ranks end first would take the others with it."""
    script = (
        LEAVES
        + """
    print("a line", flush=True)
    (folder / f"printed_{rank}").touch()
    while len(list(folder.glob("printed_*"))) < 2:  # the first to leave would end the other
        time.sleep(0.02)
    leave(int(sys.argv[1]))
"""
    )
    file = tmp_path / "resumable"
    ended = [job(script, code, own=f"--label --resumable {file}") for code in (75, 2)]
    assert ended[1].end() == 2
    assert ended[0].end() == 0
    assert file.exists()
    lines = ended[0].output().splitlines()
    assert {"[rank 0] a line", "[rank 1] a line"} <= set(lines)


# Deaths


@pytest.mark.parametrize("config", [TWO, pytest.param(ONE, marks=pytest.mark.slow)])
def test_the_death_of_accelerate(job: Callable[..., Job], config: str) -> None:
    one = job(STOPS, 0.5, config=config)
    one.wait_for("ready_*", 2 if config == TWO else 1)
    one.launcher().kill()
    assert one.end() == 75
    assert set(one.saved()) <= {"SIGTERM", "the launcher has ended"}
    assert one.saved()


@pytest.mark.slow
def test_the_death_of_accelerate_while_ranks_save(job: Callable[..., Job]) -> None:
    one = job(STOPS, 4)
    one.wait_for("ready_*", 2)
    one.process.send_signal(signal.SIGUSR1)
    time.sleep(2.5)
    one.launcher().kill()
    assert one.end() == 75
    assert one.saved() == ["SIGUSR1"] * 2  # and not ended at once by a second signal


@pytest.mark.parametrize("config", [TWO, pytest.param(ONE, marks=pytest.mark.slow)])
def test_the_death_of_launch_run_itself(job: Callable[..., Job], config: str) -> None:
    ranks = 2 if config == TWO else 1
    one = job(STOPS, 0.5, config=config)
    one.wait_for("ready_*", ranks)
    launcher = one.launcher()
    one.process.kill()
    wait_until(lambda: one.alive() == [] and not alive(launcher.pid), 10)
    assert len(one.saved()) == ranks


def test_the_helpers_of_a_killed_rank_end_too(job: Callable[..., Job]) -> None:
    script = (
        LEAVES
        + """
    if os.fork() == 0:
        (folder / f"pid_{rank}_{os.getpid()}").touch()
        os.setsid()
        time.sleep(60)
        os._exit(0)
    while len(list(folder.glob("pid_*"))) < 4:
        time.sleep(0.02)
    os.kill(os.getpid(), 9)
"""
    )
    one = job(script)
    assert one.end() == 1
    assert len(list(one.folder.glob("pid_*"))) == 4


# Restarts


def test_a_killed_rank_is_started_again_with_the_others(job: Callable[..., Job]) -> None:
    one = job(TRAINS, own="--restarts 1")
    code, output = one.end(), one.output()
    assert code == 0, output
    assert len(list(one.folder.glob("pid_*"))) == 4
    assert "launch: the job crashed; restart 1 of 1" in output


@pytest.mark.parametrize(
    ("ends", "code", "starts"),
    [(("2",), 2, 1), (("75",), 75, 2), (("killed",), 1, 2)],
)
@pytest.mark.slow
def test_what_is_started_again(job: Callable[..., Job], ends: tuple[str, ...], code: int, starts: int) -> None:
    one = job(ENDS, *ends, config=ONE, own="--restarts 1")
    assert one.end() == code
    assert len(list(one.folder.glob("pid_*"))) == starts


# Where ranks meet

MEETS = (
    LEAVES
    + """
    import psutil, torch, torch.distributed as dist
    dist.init_process_group("gloo", store=dist.FileStore(os.environ["TOOLKIT_STORE"], 2), rank=int(rank), world_size=2)
    total = torch.tensor(float(sys.argv[1]))
    dist.all_reduce(total)
    processes = [psutil.Process(), psutil.Process().parent()]
    listening = [c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    (folder / f"listening_{rank}").write_text(" ".join(listening))
    (folder / f"total_{rank}").write_text(str(total.item()))
    dist.barrier()
    report_exit_code(0)
    os._exit(0)  # gloo's threads may abort an ordinary exit
"""
)


def test_two_jobs_at_once_on_loopback_alone(job: Callable[..., Job]) -> None:
    # Ranks that form their group from MASTER_PORT meet as well, but rank 0 then opens it to all addresses.
    jobs = [job(MEETS, 1), job(MEETS, 10)]
    for number, one in enumerate(jobs):
        assert one.end() == 0, one.output()
        assert [(one.folder / f"total_{rank}").read_text() for rank in (0, 1)] == [["2.0"] * 2, ["20.0"] * 2][number]
        addresses = [(one.folder / f"listening_{rank}").read_text().split() for rank in (0, 1)]
        assert all(addresses)
        assert set(addresses[0] + addresses[1]) == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("words", "several"),
    [
        ("--num_machines 2 train.py", True),
        ("--num-machines=2 train.py", True),
        ("--num_machines 1 --config_file two.yaml train.py", False),
        ("--config_file two.yaml train.py", True),
        ("--config_file=two.json train.py", True),
        ("--config_file one.yaml train.py", False),
        ("--config_file missing.yaml train.py", False),
        ("train.py --num_machines 2", False),
        ("train.py", False),
        ("-m train", False),
    ],
)
def test_several_nodes_are_noticed(words: str, several: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    Path("two.yaml").write_text("use_cpu: true\nnum_machines: 2\n")
    Path("two.json").write_text('{"use_cpu": true, "num_machines": 2}')
    Path("one.yaml").write_text("# num_machines: 2\nnum_machines: 1\n")
    assert several_nodes(words.split()) is several


def test_accelerates_own_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("num_machines: 4\n")
    assert several_nodes(["train.py"])


@pytest.mark.slow
def test_two_nodes_start_again_together(job: Callable[..., Job]) -> None:
    port = free_port()
    options = ["--multi_gpu", "--num_machines", 2, "--num_processes", 2, "--main_process_ip", "127.0.0.1"]
    options += ["--main_process_port", port, "--same_network"]
    jobs = [job(TRAINS, *options, "--machine_rank", rank, config=None, own="--restarts 1") for rank in (0, 1)]
    for one in jobs:
        assert one.end() == 0, one.output()
        assert len(list(one.folder.glob("pid_*"))) == 2


# What it refuses


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        ([], "there is nothing to launch"),
        (["--"], "there is nothing to launch"),
        (["--config_file", "x.yaml", "train.py"], "--config_file is no option of this command"),
        (["--restarts", "-1", "--", "train.py"], "--restarts is at least 0"),
        (["--", "--max_restarts", "3", "train.py"], "use --restarts before the dashes"),
    ],
)
def test_what_it_refuses(words: list[str], fact: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "run", *words], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 2
    assert fact in done.stderr
