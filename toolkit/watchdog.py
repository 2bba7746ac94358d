"""Find a run that hangs, keep the stacks of all ranks, name the late ones, and end so that a launcher can start again.

The main thread says `beat(phase, step)` whenever it gets on. A thread of each rank compares the time since the last
beat with what that phase usually takes, and tells the other ranks through small files in the run's folder: there is
no other way out of a collective that never returns. A rank that is over its limit raises the alarm by making a folder
under `hangs/`, unless a rank that it may be waiting for is still within its own limit: a long saving on one rank is
no hang on the others. All ranks that see the folder write their stacks into it and end with `RESUMABLE_EXIT_CODE`.

Durations come from this process's monotonic clock. Whether another rank lives is told by its counter of ticks, which
changes or not while one looks; neither the clocks of other hosts nor the times of files are asked.

Not seen are a single process whose main thread never lets go of Python's global lock, and a file system that blocks
all ranks at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import shutil
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from toolkit.environment import report_exit_code
from toolkit.errors import RESUMABLE_EXIT_CODE, USER_ERROR_EXIT_CODE, FencedError
from toolkit.folders import Guard, unguarded

WINDOW = 200  # durations that are kept for each phase
ENOUGH = 5  # of them say what is usual; the first ones compile
SAVING = "saving"  # the phase that always has patience: storage may be slow at any time
ANSWERED, ALIVE, SILENT = "answered", "alive, but did not answer", "stopped or gone"


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank stands, as the other ranks read it.

    Attributes:
        attempt, rank, host, pid, created: whose it is; `created` in seconds after the host's boot.
        tick: how often the watchdog's thread has looked; a counter that stands still is a process that does.
        step, beats: the step of the last beat, and how many beats there were in that step.
        phase: what the last beat named.
        waited, limit: seconds since the last beat, and how many there may be.
    """

    attempt: int
    rank: int
    host: str
    pid: int
    created: float
    tick: int
    step: int
    beats: int
    phase: str
    waited: float
    limit: float

    @property
    def position(self) -> tuple[int, int]:
        """How far the rank has got. Beats count within a step, so that a rank with more to do is not ahead for ever."""
        return self.step, self.beats


class Watchdog:
    """The watch over one rank of a run; also a context manager around its steps.

    Args:
        folder: of the run, the same for all ranks.
        rank, size: this process among those of the run.
        attempt: which start of the run this is. Every start needs a number of its own, or the alarm of an earlier one
            would end it.
        minimum, factor: a phase may take `factor` times the 99th percentile of its durations, and always `minimum`
            seconds.
        patience: seconds for a phase with little history, and for saving; `minimum`, where that is more.
        interval: seconds between two looks of the thread.
        guard: asked at each look; where it says that another process has taken over the run, this one ends at once,
            even if it waits for ranks that are gone.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        size: int,
        attempt: int,
        minimum: float = 10.0,
        factor: float = 3.0,
        patience: float = 600.0,
        interval: float = 1.0,
        guard: Guard = unguarded,
    ) -> None:
        self._guard = guard
        self.rank, self.size, self.attempt = rank, size, attempt
        self.minimum, self.factor, self.interval = minimum, factor, interval
        self.patience = max(minimum, patience)
        self.grace = max(3 * interval, 3.0)
        self._heartbeats, self._hangs = folder / "watchdog", folder / "hangs"
        self._stacks = f"rank_{rank:05}.txt"
        self._host, self._pid, self._created = socket.gethostname(), os.getpid(), _created(psutil.Process())
        self._wake, self._stopped = threading.Event(), False
        self._thread: threading.Thread | None = None
        # From the main thread to the watchdog's; safe without a lock.
        self._beat = ("start", 0, 0, time.monotonic())
        self._finished: deque[tuple[str, float]] = deque(maxlen=100 * WINDOW)
        # The watchdog's thread alone; `beat` looks at `_limit`. `_seen` is the beat since which it has been waiting.
        self._durations: dict[str, deque[float]] = {}
        self._seen = self._beat
        self._waited, self._limit = 0.0, self.patience
        self._next_look, self._look = 0.0, dict[int, Heartbeat]()
        self._tick, self._last_tick = 0, 0.0
        self._complained = False

    def start(self) -> None:
        """Start the thread."""
        # At once, so that others know whom to end; without a limit, so that it holds nobody's alarm back.
        self._write_heartbeat(dataclasses.replace(self._heartbeat(), limit=0.0))
        self._last_tick = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, phase: str, step: int) -> None:
        """Say that the main thread gets on: what follows, until the next beat, is `phase` of `step`."""
        now = time.monotonic()
        last_phase, last_step, beats, since = self._beat
        self._finished.append((last_phase, now - since))
        self._beat = (phase, step, beats + 1 if step == last_step else 1, now)
        if self._limit > self.minimum:
            self._wake.set()  # others have read of this limit, and would wait as long for a rank that stops now

    def stop(self) -> None:
        """End the thread and remove this rank's heartbeat. An alarm that is up already still ends the process."""
        self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(10 * self.grace)
        with contextlib.suppress(OSError, FencedError):
            self._guard()
            self._path(self.rank).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _run(self) -> None:
        pause = self.interval
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            if self._stopped:
                return
            self._end_if_fenced()
            self._account()
            self._write_heartbeat(self._heartbeat())
            if self._alarms() or self._is_stuck():
                self._end()
            left = self._limit - self._waited
            pause = left if 0 < left < self.interval else self.interval

    def _end_if_fenced(self) -> None:
        try:
            self._guard()
        except FencedError as error:
            _say(f"Rank {self.rank}: {error}")
            _end_all(psutil.Process().children(recursive=True))
            report_exit_code(USER_ERROR_EXIT_CODE)
            os._exit(USER_ERROR_EXIT_CODE)
        except OSError:
            pass  # who writes will say so

    def _account(self) -> None:
        """Bring durations, waiting time and limit up to date.

        Only time that this thread has watched counts: a process that was stopped for an hour and goes on does not hang.
        """
        now = time.monotonic()
        passed, self._last_tick = min(now - self._last_tick, 2 * self.interval), now
        self._tick += 1
        while self._finished:
            phase, seconds = self._finished.popleft()
            self._durations.setdefault(phase, deque(maxlen=WINDOW)).append(seconds)
        if self._beat is self._seen:
            self._waited += passed
            return
        self._seen = self._beat
        phase, _, _, since = self._seen
        self._waited = min(now - since, passed)
        self._limit = phase_limit(phase, self._durations.get(phase, ()), self.minimum, self.factor, self.patience)
        self._next_look, self._look = self._limit / 2, {}

    def _is_stuck(self) -> bool:
        """Whether this rank is over its limit, and every rank that it may be waiting for over its own.

        The others are looked at from half of the limit on, so that their ticks have had time to change when it counts.
        """
        if self._waited < self._next_look:
            return False
        before, self._look = self._look, self._others()
        if self._waited < self._limit:
            self._next_look = self._limit
            return False
        self._next_look = self._waited + self.grace
        mine = self._heartbeat()
        return not any(
            other.position <= mine.position and _waiting(other, before.get(other.rank), mine) < other.limit
            for other in self._look.values()
        )

    def _end(self) -> None:
        """Tell what is known and end, by a timer where what blocks the run (a pipe, a disk) blocks this thread too."""
        last_resort = threading.Timer(10 * self.grace, os._exit, (RESUMABLE_EXIT_CODE,))
        last_resort.daemon = True
        last_resort.start()
        try:
            self._tell()
        except Exception as error:
            _say(f"Rank {self.rank} hangs: {_place(self._heartbeat())}. Its stacks cannot be kept ({error!r}):")
            faulthandler.dump_traceback(2, all_threads=True)  # stderr, past the buffer and its lock
        finally:
            _say()
            _end_all(psutil.Process().children(recursive=True))  # a loader that hangs would outlive this process
            report_exit_code(RESUMABLE_EXIT_CODE)
            os._exit(RESUMABLE_EXIT_CODE)

    def _tell(self) -> None:
        """Stacks of all ranks, a summary by one of them, and the end of those that cannot end themselves."""
        before = self._others()
        folder, answered = self._gather()
        summary = folder / "summary.json"
        deadline = time.monotonic() + (0 if self.rank == min(answered) else self.grace)
        while not summary.exists() and time.monotonic() < deadline:
            # Who leaves early makes the launcher end the others, the writer of the summary among them.
            time.sleep(self.interval)
        findings = [self._find(rank, before.get(rank), answered) for rank in range(self.size)]
        if not summary.exists():
            content = summarise(findings, folder, self.attempt)
            _say(message(content))
            _write(summary, json.dumps(content, indent=2) + "\n")
            for another in set(self._alarms()) - {folder}:
                shutil.rmtree(another, ignore_errors=True)
        for item in findings:
            if item["sign"] == SILENT and item.get("host") == self._host:
                kill(item["pid"], item["created"])

    def _gather(self) -> tuple[Path, set[int]]:
        """The alarm's folder with this rank's stacks, and who has put theirs there before the grace was over."""
        deadline = time.monotonic() + self.grace
        while True:
            alarms = self._alarms()
            # Several ranks may have raised it in the same moment: all end up with the first.
            folder = alarms[0] if alarms else self._hangs / f"attempt_{self.attempt:04}_step_{self._seen[1]:08}"
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / self._stacks).exists():
                self._write_heartbeat(self._heartbeat())
                self._dump(folder)
            answered = {int(path.stem.removeprefix("rank_")) for path in folder.glob("rank_*.txt")}
            if len(answered) >= self.size or time.monotonic() >= deadline:
                return folder, answered
            time.sleep(self.interval)

    def _alarms(self) -> list[Path]:
        try:
            return sorted(self._hangs.glob(f"attempt_{self.attempt:04}_*"))
        except OSError:
            return []

    def _dump(self, folder: Path) -> None:
        """Write the stacks of all threads of this process, whole or not at all."""
        partial = folder / f"{self._stacks}.part"
        with partial.open("w", encoding="utf-8") as file:
            file.write(f"Rank {self.rank} on {self._host}, process {self._pid}: {_place(self._heartbeat())}\n")
            file.write(f"The main thread is 0x{threading.main_thread().ident:016x}.\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        partial.replace(folder / self._stacks)

    def _find(self, rank: int, before: Heartbeat | None, answered: Collection[int]) -> dict[str, Any]:
        """What the alarm found out about one rank: its sign of life, and its heartbeat where there is one."""
        now = self._read(rank)
        sign = ANSWERED if rank in answered else ALIVE if now is not None and _ticked(before, now) else SILENT
        return {"rank": rank, "sign": sign} | (dataclasses.asdict(now) if now is not None else {})

    def _heartbeat(self) -> Heartbeat:
        phase, step, beats, _ = self._seen
        waited, limit = round(self._waited, 3), round(self._limit, 3)
        process = (self.attempt, self.rank, self._host, self._pid, self._created)
        return Heartbeat(*process, self._tick, step, beats, phase, waited, limit)

    def _write_heartbeat(self, heartbeat: Heartbeat) -> None:
        try:
            self._heartbeats.mkdir(parents=True, exist_ok=True)
            _write(self._path(self.rank), json.dumps(dataclasses.asdict(heartbeat)))
        except OSError as error:
            if not self._complained:
                _say(f"Rank {self.rank} cannot write its heartbeat, so others may miss it if the run hangs: {error}")
                self._complained = True

    def _others(self) -> dict[int, Heartbeat]:
        found = {rank: self._read(rank) for rank in range(self.size) if rank != self.rank}
        return {rank: heartbeat for rank, heartbeat in found.items() if heartbeat is not None}

    def _read(self, rank: int) -> Heartbeat | None:
        """The heartbeat of a rank, or None where this attempt has none that can be read."""
        try:
            heartbeat = Heartbeat(**json.loads(self._path(rank).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return heartbeat if heartbeat.attempt == self.attempt else None

    def _path(self, rank: int) -> Path:
        return self._heartbeats / f"rank_{rank:05}.json"


def phase_limit(phase: str, durations: Collection[float], minimum: float, factor: float, patience: float) -> float:
    """Seconds that a phase may take, from what it took before (the 99th percentile by nearest rank)."""
    if len(durations) < ENOUGH:
        return patience
    usual = sorted(durations)[math.ceil(0.99 * len(durations)) - 1]
    return max(patience if phase == SAVING else minimum, factor * usual)


def slow_ranks(busy_seconds: Sequence[float], factor: float = 2.0) -> list[int]:
    """The ranks that were busy for more than `factor` times the median of all.

    The lower median, where there are two: of two ranks, one could never exceed twice the mean of both.
    """
    usual = statistics.median_low(busy_seconds) if busy_seconds else 0.0
    return [rank for rank, seconds in enumerate(busy_seconds) if seconds > factor * usual]


def summarise(findings: Sequence[dict[str, Any]], folder: Path, attempt: int) -> dict[str, Any]:
    """What `summary.json` holds: the step, the time without progress, who was late, and where each rank stood."""
    positions = [(item.get("step", 0), item.get("beats", 0)) for item in findings]
    furthest = max(positions)
    return {
        "attempt": attempt,
        "step": furthest[0],
        "seconds_without_progress": max(item.get("waited", 0.0) for item in findings if item["sign"] != SILENT),
        "late": [rank for rank, at in enumerate(positions) if at != furthest or findings[rank]["sign"] == SILENT],
        "stacks": str(folder),
        "ranks": list(findings),
    }


def message(summary: dict[str, Any]) -> str:
    """The summary for people: one line for the ranks that stand at the same point."""
    groups: dict[str, list[int]] = {}
    for item in summary["ranks"]:
        place = f"step {item['step']}, phase {item['phase']}" if "step" in item else "no heartbeat"
        said = place if item["sign"] == ANSWERED else f"{item['sign']} ({place})"
        groups.setdefault(said, []).append(item["rank"])
    late = f"late: {_ranks(summary['late'])}." if summary["late"] else "no rank is behind the others: compare stacks."
    first = "The run hangs in step {step}: no progress for {seconds_without_progress:.0f} s; ".format(**summary)
    places = [f"  {_ranks(ranks)}: {said}" for said, ranks in groups.items()]
    last = f"  All ranks end with exit code {RESUMABLE_EXIT_CODE}: the run can be started again."
    return "\n".join((first + late, *places, f"  Where each stood in the code: {summary['stacks']}", last))


def kill(pid: int, created: float) -> None:
    """End a process that cannot do it itself, if its number still means the one created so many seconds after boot."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(_created(process) - created) < 2.0:  # the boot time has a resolution of a second
            _end_all([process, *process.children(recursive=True)])


def _end_all(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _created(process: psutil.Process) -> float:
    """Seconds after boot, which do not change when somebody sets the clock."""
    boot = psutil.boot_time()
    return float(process.create_time() - boot)


def _ticked(before: Heartbeat | None, now: Heartbeat) -> bool:
    return before is not None and now.tick != before.tick


def _waiting(other: Heartbeat, before: Heartbeat | None, mine: Heartbeat) -> float:
    """How long another rank has been without a beat: its own count, or mine where its thread stands still.

    That may be a stopped process, or one whose main thread keeps the global lock, as some do while they save.
    """
    return other.waited if _ticked(before, other) else max(other.waited, mine.waited)


def _place(heartbeat: Heartbeat) -> str:
    return f"step {heartbeat.step}, phase {heartbeat.phase}, for {heartbeat.waited:.1f} s of {heartbeat.limit:.1f} s"


def _ranks(ranks: Sequence[int]) -> str:
    names = ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {names}"


def _write(path: Path, text: str) -> None:
    """Write so that a reader finds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _say(text: str = "") -> None:
    """Print to stderr and empty the buffers, without waiting for a reader that hangs or a lock that the others hold."""

    def speak() -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"{text}\n" if text else "")
            sys.stderr.flush()
            sys.stdout.flush()

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    speaker.join(1.0)
