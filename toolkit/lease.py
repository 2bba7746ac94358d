"""Who may write to a run's folder: a lease whose number only grows, so that a writer of old learns that it is one.

A lock is not enough on a cluster. A node that SLURM has lost sight of may go on running, or wake up again, when the job
that was queued again has begun on other nodes: then two writers hold one folder, and not every shared file system has
locks that other nodes see. So every start takes a lease, a file in `.lease/` whose number is one higher than the last;
whoever holds a lower one is fenced: it may write no more.

Taking is creating a file that must not be there. Then the taker replaces what the former holder may have open, or has
written aside and not yet renamed. A writer checks its lease when it has opened what it appends to, and before it
renames what it has written aside. Whatever the moment at which it was stopped: it writes to a file that is no longer
the run's, renames one that is gone, or finds that it is fenced.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolkit.environment import Job
from toolkit.errors import CheckpointError, FencedError
from toolkit.folders import remove_asides

FOLDER = ".lease"


class Lease:
    """The right to write to a run's folder, held by the processes of one start.

    Args:
        run: its folder.
        number: of this start's lease.
    """

    def __init__(self, run: Path, number: int) -> None:
        self.number = number
        self._run = run
        self._checked = time.monotonic()

    def check(self, max_age: float = 0.0) -> None:
        """Check that nobody has taken over; the last answer will do where it is younger than `max_age` seconds.

        Raises:
            FencedError: somebody has, or the folder is gone.
            OSError: it cannot be read.
        """
        now = time.monotonic()
        if now - self._checked < max_age:
            return
        newest = newest_lease(self._run)
        if newest > self.number:
            holder = _holder(self._run, newest)
            raise FencedError(
                f"{_name(holder)} has taken over {self._run}: this start of the run is fenced, and writes no more",
                "Nothing is to be done: what the other one writes is complete without this process.",
            )
        if newest < self.number:
            raise FencedError(f"{self._run} was removed or emptied while it was written to", "Start the run again.")
        self._checked = now


def newest_lease(run: Path) -> int:
    """The number of the lease that counts; 0 where none was taken."""
    try:
        return max((int(name[:-5]) for name in os.listdir(run / FOLDER) if name[:-5].isdecimal()), default=0)  # noqa: PTH208
    except FileNotFoundError:
        return 0


def break_lock(run: Path, job: Job) -> None:
    """Remove the lock of a former start of the same job, whose processes SLURM has ended or lost; or of a fenced one.

    A process that is cut off or stopped may still hold it. A new lock is another file, which it does not hold.

    Raises:
        FencedError: a later start of the job has the run already.
    """
    holder = _holder(run, newest_lease(run))
    same = bool(job.id) and holder.get("job") == job.id
    if same and int(holder["start"]) > job.start:
        raise FencedError(f"{_name(holder)} has taken over {run}", "Nothing is to be done: it goes on there.")
    if (same and int(holder["start"]) < job.start) or holder.get("free"):
        (run / ".lock").unlink(missing_ok=True)


def take(run: Path, job: Job) -> Lease:
    """Take the lease of the run, for all ranks of this start. Called by one of them, which holds the lock.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    folder = run / FOLDER
    now = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"job": job.id, "start": job.start, "host": socket.gethostname(), "pid": os.getpid(), "time": now}
    try:
        folder.mkdir(exist_ok=True)
        number = newest_lease(run) + 1
        # Another may take this one, or a higher one and remove this one, at the same moment.
        while not _created(folder / f"{number:08d}.json", holder) or newest_lease(run) > number:
            number += 1
        for path in folder.iterdir():
            if path.stem.isdecimal() and int(path.stem) < number:
                path.unlink(missing_ok=True)
        if number > 1:
            _out_of_reach(run)
    except OSError as error:
        raise CheckpointError(
            f"{run} cannot be written to ({error.strerror})", "Free the disk, or name another folder with --run.dir."
        ) from error
    return Lease(run, number)


def _created(path: Path, holder: dict[str, Any]) -> bool:
    """Create the file of a lease, unless it is there. Exclusive creation is atomic on shared file systems too."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(holder) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _out_of_reach(run: Path) -> None:
    """Take from the former holder what it may have open for appending, or written aside and not yet renamed."""
    remove_asides(run)
    for path in (*run.glob(".*.tmp"), *run.glob("*/.*.tmp"), run / "checkpoints" / ".latest.json"):
        path.unlink(missing_ok=True)
    for path in (run / "attempts.jsonl", run / "metrics.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            aside.write_bytes(path.read_bytes())
            aside.replace(path)


def _holder(run: Path, number: int) -> dict[str, Any]:
    """Who took a lease; nothing where there is none, or where it is still being written."""
    try:
        content = json.loads((run / FOLDER / f"{number:08d}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    if holder.get("free"):
        return "`launch resume`"
    who = f"job {holder['job']}, start {int(holder['start']) + 1}" if holder.get("job") else "another process"
    return f"{who} on {holder['host']}" if holder.get("host") else who
