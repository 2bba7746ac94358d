"""The faults of `chaos.py`: what happens to which process or file, at which moment, and how long the job needs then."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.chaos_job import Job
from toolkit.checkpoint.store import Store

IN_A_SAVE = 0.5
"""Share of the faults that wait for a save to begin."""
SAVE_SECONDS = 0.3
"""How long after that they strike, at most."""
START_SECONDS = 10.0
"""After which a start is not yet over, at most."""
ENOUGH_STEPS = 8
"""Of an attempt, before a rank is stopped: with less history a watchdog has ten minutes' patience."""
LOOK = 0.25
"""Seconds between two looks at the processes; files are looked at all the time."""


@dataclass
class Fault:
    """One fault and what followed.

    Attributes:
        kind: one of `KINDS`.
        detail: to which rank, launcher or file.
        at: seconds since the first step of the run.
        attempts: the first and the last that it ended; those of a killed start may be the one before it alone.
        step: that it fell into.
        in_save: whether a checkpoint was being written.
        seconds: from the fault to the next optimizer step of a new attempt; None where there was none in time.
        launched, begun: seconds from the fault until the ranks were started again, and until the attempt began.
        processor: seconds of a core that the start took of the launcher and of a rank, one after the other.
        starts: of the command line that were needed.
        repeated: optimizer steps that were taken again.
        error: what went wrong.
    """

    kind: str
    detail: str = ""
    at: float = 0.0
    attempts: tuple[int, int] = (0, 0)
    step: int = 0
    in_save: bool = False
    seconds: float | None = None
    launched: float | None = None
    begun: float | None = None
    processor: float | None = None
    starts: int = 0
    repeated: int = 0
    error: str = ""


def strike(job: Job, kind: str, rng: random.Random) -> tuple[Fault, float, set[psutil.Process]]:
    """Let a fault happen; it, the moment by the monotonic clock, and the ranks before it."""
    fault, attempt_before = Fault(kind), job.position()[0]  # a killed start ends two
    if kind == "stop rank":
        _wait(lambda: _steps(job) >= ENOUGH_STEPS, 60)
    if kind == "kill start":
        _begin_to_start(job, rng)
    elif rng.random() < IN_A_SAVE:
        _wait(lambda: job.saving, 10)
        time.sleep(rng.uniform(0, SAVE_SECONDS))
    ranks = job.ranks()
    attempt, fault.step = job.position()
    fault.attempts, fault.in_save = (attempt_before, attempt), job.saving and kind != "kill start"
    moment = time.monotonic()
    fault.detail = KINDS[kind](job, ranks, rng)
    return fault, moment, set(ranks.values())


def recover(job: Job, fault: Fault, moment: float, before: set[psutil.Process], patience: float) -> None:
    """Wait for the next optimizer step of a new attempt, and start the command line again where its launcher ends."""
    starts, look, seen, ended = len(job.starts), 0.0, before, fault.attempts[1]
    while time.monotonic() - moment < patience:
        job.keep_up()
        now = time.monotonic() - moment
        attempt, step = job.position()
        if attempt > ended and fault.begun is None:
            fault.begun = now
        if job.finished or (attempt > ended and step):
            fault.seconds, fault.processor = now, job.processor_seconds()
            break
        if now >= look:
            look = now + LOOK
            if (ranks := set(job.ranks().values())) and not ranks & seen:
                fault.launched, fault.begun, seen = now, None, ranks
        time.sleep(0.02)
    fault.starts = len(job.starts) - starts
    if fault.seconds is None:
        fault.error = f"no optimizer step in {patience:.0f} s:\n{job.last_words()}"
    elif fault.starts > (fault.detail in _LAUNCHER_GONE or fault.kind in _ENDS_THE_LAUNCHER):
        codes = [code for code in job.starts[starts - 1 :] if code is not None]
        fault.error = f"the command line was needed {fault.starts} times; it ended with {codes}"


def _kill_rank(job: Job, ranks: dict[int, psutil.Process], rng: random.Random) -> str:
    return _signal_rank(ranks, rng, signal.SIGKILL)


def _kill_ranks(job: Job, ranks: dict[int, psutil.Process], rng: random.Random) -> str:
    for process in ranks.values():
        _send(process, signal.SIGKILL)
    return "all ranks"


def _kill_launcher(job: Job, ranks: dict[int, psutil.Process], rng: random.Random) -> str:
    launchers = job.launchers()
    which = rng.choice(("both launchers", "outer launcher", "inner launcher"))
    for process in {"outer launcher": launchers[:1], "inner launcher": launchers[1:]}.get(which, launchers):
        _send(process, signal.SIGKILL)
    return which


def _kill_all(job: Job, ranks: dict[int, psutil.Process], rng: random.Random) -> str:
    for process in (*job.launchers(), *ranks.values()):
        _send(process, signal.SIGKILL)
    return "launcher and ranks"


def _kill_start(job: Job, ranks: dict[int, psutil.Process], rng: random.Random) -> str:
    if rng.random() < 0.5:
        return _kill_ranks(job, ranks, rng)
    return _kill_rank(job, ranks, rng)


def _term_launcher(job: Job, ranks: dict[int, psutil.Process], rng: random.Random) -> str:
    for process in job.launchers()[:1]:
        _send(process, signal.SIGTERM)
    return "launcher"


def _usr1_rank(job: Job, ranks: dict[int, psutil.Process], rng: random.Random) -> str:
    return _signal_rank(ranks, rng, signal.SIGUSR1)


def _term_rank(job: Job, ranks: dict[int, psutil.Process], rng: random.Random) -> str:
    return _signal_rank(ranks, rng, signal.SIGTERM)


def _stop_rank(job: Job, ranks: dict[int, psutil.Process], rng: random.Random) -> str:
    return _signal_rank(ranks, rng, signal.SIGSTOP)


def _corrupt(job: Job, ranks: dict[int, psutil.Process], rng: random.Random) -> str:
    _wait(lambda: len(Store(job.run).committed()) > 1, 10)
    how = rng.choice(("flipped bit", "cut", "deleted"))
    path = rng.choice(sorted(Store(job.run).committed()[0][1].iterdir()))
    damage(path, how, rng)
    _kill_ranks(job, ranks, rng)
    return f"{how}: {path.parent.name}/{path.name}"


def damage(path: Path, how: str, rng: random.Random) -> None:
    """Delete a file, cut it short, or flip one bit of it."""
    size = path.stat().st_size
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        os.truncate(path, rng.randrange(size))
    else:
        with path.open("r+b") as file:
            place = rng.randrange(size)
            file.seek(place)
            byte = file.read(1)[0] ^ 1 << rng.randrange(8)
            file.seek(place)
            file.write(bytes([byte]))


_LAUNCHER_GONE = ("both launchers", "outer launcher")
_ENDS_THE_LAUNCHER = ("kill all", "term launcher")

KINDS: dict[str, Callable[[Job, dict[int, psutil.Process], random.Random], str]] = {
    "kill rank": _kill_rank,
    "kill ranks": _kill_ranks,
    "kill launcher": _kill_launcher,
    "kill all": _kill_all,
    "kill start": _kill_start,
    "corrupt, kill": _corrupt,
    "stop rank": _stop_rank,
    "term rank": _term_rank,
    "usr1 rank": _usr1_rank,
    "term launcher": _term_launcher,
}
"""What each kind does, given the job, its ranks and the dice; it says what it chose."""

KILLS = ("kill rank", "kill ranks", "kill launcher", "kill all", "kill start", "corrupt, kill")
"""Those by SIGKILL."""


def _begin_to_start(job: Job, rng: random.Random) -> None:
    """Have all ranks killed, and wait until some moment in which the next ones start."""
    old = job.ranks()
    _kill_ranks(job, old, rng)
    _wait(lambda: bool(set(job.ranks().values()) - set(old.values())), 60)
    time.sleep(rng.uniform(0, START_SECONDS))


def _steps(job: Job) -> int:
    """That the newest attempt has entered."""
    ledger = job.run / "samples" / f"attempt_{job.position()[0]:04d}" / "rank_00000.jsonl"
    with contextlib.suppress(OSError):
        return ledger.read_bytes().count(b"\n")
    return 0


def _signal_rank(ranks: dict[int, psutil.Process], rng: random.Random, number: signal.Signals) -> str:
    if not ranks:
        return "no rank: they were gone"
    rank = rng.choice(sorted(ranks))
    _send(ranks[rank], number)
    return f"rank {rank}"


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)  # which sees to it that the number still means this process


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
