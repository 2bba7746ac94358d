"""`python -m launch status|logs|stop|resume RUN`: the job of a run's folder.

In `RUN/slurm/` lie the script (`job.sh`), the numbers of the jobs that ran it (`jobs`, the last one counts), and their
output (`NUMBER.log`, to which a start after a requeue is appended). What the run has done is read from its own files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch.errors import UserError
from launch.slurm_client import JobState, cancel, checked_id, job_states, signal_batch, submit

POLL = 1.0
"""Seconds between two questions to SLURM, or looks at a log."""

_LABEL = re.compile(r"^\s*(\d+): (?:\[rank (\d+)\] )?")


def enter(run: Path, number: str) -> None:
    """Note the number of a job that was submitted for a run."""
    with (run / "slurm" / "jobs").open("a", encoding="ascii") as file:
        file.write(f"{number}\n")


def status(argv: Sequence[str]) -> int:
    """Print how the job and the run stand; exit code 0, or 1 where the job has failed."""
    parser = argparse.ArgumentParser(prog="python -m launch status", description="How a job and its run stand.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    run = _run(parser.parse_args(argv).run)
    states = _states(run)
    blocks = [list(_lines(run / state.index if state.index else run, state)) for state in states]
    for task in _forgotten(run, states):
        fact = f"{_job(run)}: it has ended some time ago, and SLURM has forgotten it"
        blocks.append([("run", os.path.relpath(task)), ("job", fact), *_progress(task)])
    print("\n\n".join("\n".join(f"{name:11} {text}" for name, text in block) for block in blocks))
    return int(any(state.ended and state.state != "COMPLETED" for state in states))


def logs(argv: Sequence[str]) -> int:
    """Print the output of the job's last start, and on with `--follow` until it has ended."""
    parser = argparse.ArgumentParser(prog="python -m launch logs", description="What the nodes and ranks print.")
    parser.epilog = "Each line begins with the number of its node in the job, and the rank, where one printed it."
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--follow", action="store_true", help="until the job has ended, through requeues")
    parser.add_argument("--node", type=int, help="only lines of this one, counted from 0")
    parser.add_argument("--rank", type=int, help="only lines of this one")
    options = parser.parse_args(argv)
    run = _run(options.run)
    read: dict[Path, int] = {}
    while True:
        active = options.follow and any(not state.ended for state in _states(run))
        number = _job(run)
        files = [*(run / "slurm").glob(f"{number}.log"), *sorted((run / "slurm").glob(f"{number}_*.log"))]
        for file in files:
            for line in _new_lines(file, read, rest=not active):
                label = _LABEL.match(line)
                if options.node is not None and not (label and int(label[1]) == options.node):
                    continue
                if options.rank is not None and not (label and label[2] == str(options.rank)):
                    continue
                print(f"{file.stem}| {line}" if len(files) > 1 else line, flush=True)
        if not active:
            break
        time.sleep(POLL)
    if not read:
        print(
            f"there is no output of job {_job(run)} yet; if it has ended, the nodes do not see {run}", file=sys.stderr
        )
    return 0


def stop(argv: Sequence[str]) -> int:
    """Ask a job to save and end without being queued again, and wait until it has; exit code 1 where it has not."""
    parser = argparse.ArgumentParser(prog="python -m launch stop", description="End a job so that it can go on later.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--wait", type=float, default=600, metavar="S", help="seconds at most (default: 600)")
    options = parser.parse_args(argv)
    run = _run(options.run)
    told: set[tuple[str, int, str]] = set()
    deadline = time.monotonic() + options.wait
    while active := [state for state in _states(run) if not state.ended]:
        for state in active:
            this = (state.id, state.restarts, state.state)  # SLURM may queue it again meanwhile, for a node that died
            if said := "" if this in told else _ask_to_end(run, state):
                told.add(this)
                print(f"job {state.id}: {said}", flush=True)
        if time.monotonic() > deadline:
            print(f"not ended after {options.wait:.0f} s: {', '.join(s.id for s in active)}", file=sys.stderr)
            return 1
        time.sleep(POLL)
    if not told:
        print(f"job {_job(run)} has ended already")
        return 0
    status([str(run)])
    print(f"go on with  python -m launch resume {shlex.quote(os.path.relpath(run))}")
    return 0


def resume(argv: Sequence[str]) -> int:
    """Submit a run's script again."""
    parser = argparse.ArgumentParser(prog="python -m launch resume", description="Submit the script of a run again.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--nodes", type=int, help="another number of them")
    parser.add_argument("--time", help="another limit")
    options = parser.parse_args(argv)
    run = _run(options.run)
    if options.nodes is not None and options.nodes < 1:
        raise UserError(f"--nodes {options.nodes}: at least 1 is needed", "Ask for one or more.")
    if options.time is not None and not re.fullmatch(r"[\d:-]+", options.time):
        raise UserError(f"--time {options.time} is no time", "Write 90 (minutes), 4:00:00 or 2-12:00:00.")
    if active := [state for state in _states(run) if not state.ended]:
        raise UserError(
            f"job {active[0].id} of {run} is {active[0].state.lower()}", f"End it first: python -m launch stop {run}."
        )
    for folder in [run, *(path for path in run.iterdir() if path.name.isdecimal())]:
        _give_up_lease(folder)
    wishes = {"nodes": options.nodes, "time": options.time}
    number = submit(str(run / "slurm" / "job.sh"), [f"--{name}={wish}" for name, wish in wishes.items() if wish])
    enter(run, number)
    print(f"job {number}: goes on with {os.path.relpath(run)}")
    return 0


def _run(folder: Path) -> Path:
    """The folder of a run with a job, or of the array that a run is part of."""
    for run in (folder.absolute(), folder.absolute().parent):
        if (run / "slurm" / "job.sh").is_file():
            return run
    raise UserError(
        f"{folder} is not the folder of a run that SLURM was given: there is no {folder}/slurm/job.sh",
        "Name the folder that `python -m launch slurm` has told.",
    )


def _job(run: Path) -> str:
    """The number of the last job."""
    try:
        numbers = (run / "slurm" / "jobs").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        numbers = []
    if not numbers:
        raise UserError(f"no job was submitted for {run}", f"Submit it: sbatch {run}/slurm/job.sh.")
    return checked_id(numbers[-1])


def _states(run: Path) -> list[JobState]:
    return job_states(_job(run))


def _forgotten(run: Path, states: Sequence[JobState]) -> list[Path]:
    """Folders of a job, or of tasks of an array, that SLURM no longer speaks of: it does for some minutes."""
    known = {state.index for state in states}
    if any(index and not index.isdecimal() for index in known):  # as 0-3: tasks that wait
        return []
    tasks = sorted(path for path in run.iterdir() if path.name.isdecimal() and path.name not in known)
    return tasks or ([] if states else [run])


def _ask_to_end(run: Path, state: JobState) -> str:
    """What was done to let it end; empty where it is between two states."""
    if state.state == "RUNNING":
        folder = (run / state.index if state.index else run) / "slurm"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"stop-{state.id}").touch()
        signal_batch(state.id, "USR1")
        return "asked to save and end"
    if state.state == "COMPLETING":
        return ""
    cancel(state.id)
    return "taken out of the queue"


def _lines(run: Path, state: JobState) -> Iterator[tuple[str, str]]:
    """What there is to say of a job, or of a task of an array."""
    yield "run", os.path.relpath(run)
    nodes = state.fields.get("NodeList", "")
    where = f" on {nodes}" if nodes and nodes != "(null)" else ""
    reason = state.fields.get("Reason", "None")
    why = f" ({reason})" if reason not in ("None", "") else ""
    again = f", queued again {_times(state.restarts)}" if state.restarts else ""
    yield "job", f"{state.id}: {state.state.lower()}{where}{why}{again}"
    took, limit = state.seconds("RunTime"), state.seconds("TimeLimit")
    if took is not None and not state.ended and state.state != "PENDING":
        left = f", {_clock(limit - took)} to the limit" if limit is not None else ", without a limit"
        yield "time", f"{_clock(took)} since this start{left}"
    yield from _progress(run)


def _progress(run: Path) -> Iterator[tuple[str, str]]:
    """How far the run has come, from its own files."""
    step, total = _last_step(run), _total(run)
    share = f" of {total:,} ({step / total:.0%})" if total else ""
    yield "step", f"{step:,}{share}" if step or total else "none yet"
    kept = sorted(int(path.name[5:]) for path in run.glob("checkpoints/step_*") if (path / "manifest.json").is_file())
    if _read(run / "report.json").get("status") == "finished":
        yield "checkpoint", f"the run is finished; its report: {os.path.relpath(run / 'report.html')}"
    else:
        yield "checkpoint", f"the next start goes on after step {kept[-1]:,}" if kept else "none yet"


def _last_step(run: Path) -> int:
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
        lines = file.read().split(b"\n")[:-1]  # what comes after the last line break is being written
        return int(json.loads(lines[-1])["step"])
    return 0


def _total(run: Path) -> int:
    effective = _read(run / "manifest.json").get("effective", {})
    return int(effective.get("total_steps", 0))


def _read(file: Path) -> dict[str, Any]:
    """A JSON file of the run; nothing where there is none yet."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(file.read_text(encoding="utf-8")))
    return {}


def _new_lines(file: Path, read: dict[Path, int], rest: bool) -> Iterator[str]:
    """Whole lines since the last look, and with `rest` what has no line break."""
    with file.open("rb") as opened:
        opened.seek(read.setdefault(file, 0))
        content = opened.read()
    if not rest:
        content = content[: content.rfind(b"\n") + 1]
    read[file] += len(content)
    yield from content.decode("utf-8", "replace").splitlines()


def _give_up_lease(run: Path) -> None:
    """Take the lease of a run from the former job: what of it may still run on a lost node writes nothing any more.

    The next start then need not wait for a lock that it may hold. `toolkit/lease.py` has the other side of it.
    """
    folder = run / ".lease"
    if not folder.is_dir():
        return
    number = max((int(path.stem) for path in folder.glob("*.json") if path.stem.isdecimal()), default=0) + 1
    with contextlib.suppress(FileExistsError), (folder / f"{number:08d}.json").open("x", encoding="utf-8") as file:
        file.write(json.dumps({"free": True}) + "\n")


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _clock(seconds: int) -> str:
    return f"{max(seconds, 0) // 3600}:{max(seconds, 0) // 60 % 60:02d}:{max(seconds, 0) % 60:02d}"
