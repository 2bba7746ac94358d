"""The job that `chaos.py` disturbs: a recipe under `python -m launch run`, its processes, and what it leaves behind.

Every process that is started here stays a descendant of this one, even where its parent is killed: this process takes
orphans in (Linux). So nothing else can be signalled, and nothing is left over.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from toolkit.checkpoint.account import account
from toolkit.checkpoint.attempts import CRASHES, Attempts, ledgers
from toolkit.checkpoint.lines import last_line
from toolkit.checkpoint.store import Store
from toolkit.report import RunFolder

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "bert_cls.py"
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
RESTARTS = 100_000


class Job:
    """One run of the recipe, which the same command line starts as often as its launcher ends.

    Args:
        place: folder for it; the run is in `run`, what all processes print in `output.txt`.
        ranks: processes.
        options: of the recipe.

    Attributes:
        run: its folder.
        starts: of the launcher, with the exit code of each that has ended.
    """

    def __init__(self, place: Path, ranks: int, options: Sequence[str]) -> None:
        self.run = place / "run"
        self.output = place / "output.txt"
        self.starts: list[int | None] = []
        self._launcher: subprocess.Popen[bytes] | None = None
        file = ROOT / "configs" / "accelerate" / "cpu2.yaml"
        self._command = [
            *(sys.executable, "-m", "launch", "run", "--restarts", str(RESTARTS), "--"),
            *("--config_file", str(file), "--num_processes", str(ranks), "--num_cpu_threads_per_process", "1"),
            *(str(RECIPE), *options, "--run.dir", str(self.run)),
        ]
        place.mkdir(parents=True, exist_ok=True)
        adopt_orphans()

    @property
    def finished(self) -> bool:
        """Whether the run is finished and its launcher has ended."""
        return self._launcher is not None and self._launcher.poll() == 0

    def keep_up(self) -> None:
        """Start the command line, if its launcher is not there; and let the dead be forgotten."""
        if self._launcher is not None:
            if self._launcher.poll() is None or self.finished:
                self._bury()
                return
            self.starts[-1] = self._launcher.returncode
        with self.output.open("ab") as output:
            self._launcher = subprocess.Popen(
                self._command,
                cwd=self.run.parent,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for this benchmark, which ends the job itself
            )
        self.starts.append(None)

    def wait(self, seconds: float) -> None:
        """Wait for the end of the run, whatever number of starts it takes; an error after so many seconds."""
        end = time.monotonic() + seconds
        while not self.finished:
            self.keep_up()
            if time.monotonic() > end:
                raise TimeoutError(f"the run did not finish in {seconds:.0f} s: see {self.output}")
            time.sleep(0.05)

    def launchers(self) -> list[psutil.Process]:
        """`python -m launch run` and the `accelerate launch` that it has started, as far as they live."""
        if self._launcher is None or self._launcher.poll() is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self._launcher.pid)
            inner = [child for child in launcher.children() if any("accelerate_cli" in word for word in _words(child))]
            return [launcher, *inner]
        return []

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that the launcher has started last and that live, by number."""
        found = {}
        for accelerate in self.launchers()[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in accelerate.children():
                    if str(RECIPE) in _words(child)[1:4] and (number := _rank(child)) is not None:
                        found[number] = child
        return found

    def processor_seconds(self) -> float:
        """What the inner launcher and then the busiest of its ranks have used: the least that a start can take."""
        used = [0.0]
        for group in (self.launchers()[1:], self.ranks().values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                used.append(max((sum(process.cpu_times()[:2]) for process in group), default=0.0))
        return sum(used)

    def position(self) -> tuple[int, int]:
        """The newest attempt, and the last optimizer step that its rank 0 has entered; 0 where there is none."""
        attempts = sorted((self.run / "samples").glob("attempt_*"))
        if not attempts:
            return 0, 0
        number = int(attempts[-1].name.removeprefix("attempt_"))
        ledger = ledgers(self.run, number).get(0)
        line = last_line(ledger) if ledger else None
        return number, int(line["step"]) if line else 0

    def begun_at(self, attempt: int) -> float:
        """When an attempt began, by the clock of its files."""
        return ledgers(self.run, attempt)[0].parent.stat().st_mtime

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return bool(Store(self.run).unfinished())

    def end(self) -> None:
        """Kill everything that was started here and is still there."""
        for process in [*self.launchers()[:1], *psutil.Process().children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        deadline = time.monotonic() + 10
        while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
            for process in left:  # orphans of those that were killed first come here late
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if self._launcher is not None:
                self._launcher.poll()
            self._bury()
            time.sleep(0.02)

    def last_words(self, lines: int = 15) -> str:
        """The end of what the processes have printed; lines that differ in numbers alone are one."""
        text = self.output.read_text(encoding="utf-8", errors="replace")
        groups = itertools.groupby(text.splitlines(), lambda line: re.sub(r"\d+", "", line))
        return "\n".join([list(group)[-1] for _, group in groups][-lines:])

    def _bury(self) -> None:
        own = self._launcher.pid if self._launcher else 0
        for child in psutil.Process().children():
            with contextlib.suppress(ChildProcessError, psutil.NoSuchProcess):
                if child.pid != own and child.status() == psutil.STATUS_ZOMBIE:
                    os.waitpid(child.pid, os.WNOHANG)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "prctl") or libc.prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1)):
        raise SystemExit("this benchmark needs Linux, where a process can take orphans in")


def environment() -> dict[str, str]:
    """That of a user without a GPU and without a network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "OMP_"))}
    return kept | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The steps that count, from metrics.jsonl; a last line that is being written is left out."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def step_seconds(run: Path) -> list[float]:
    """How long each step took that counts."""
    seen, seconds = 0, []
    for line in metrics(run):
        seconds.append((line["samples_seen"] - seen) / line["samples_per_second"])
        seen = line["samples_seen"]
    return seconds


def compare(run: Path, whole: Path) -> dict[str, Any]:
    """A finished run against one that nothing disturbed, to the last bit; and its account of samples."""
    names = ("step", "loss", "grad_norm", "lr")
    ours, theirs = ([tuple(line[name] for name in names) for line in metrics(folder)] for folder in (run, whole))
    hashes = [_digest(folder / "model" / "model.safetensors") for folder in (run, whole)]
    evaluations = [RunFolder(folder).read_report()["evaluations"] for folder in (run, whole)]
    found = account(run)
    return {
        "weights": hashes,
        "weights_equal": hashes[0] == hashes[1],
        "steps": len(theirs),
        "steps_equal": sum(a == b for a, b in zip(ours, theirs, strict=False)),
        "curve_equal": ours == theirs,
        "evaluations_equal": evaluations[0] == evaluations[1],
        "lost": found.lost,
        "duplicate": found.duplicate,
        "misplaced": found.misplaced,
        "samples": found.samples,
    }


def repeated_steps(run: Path) -> dict[int, int]:
    """Of each attempt but the last, how many of its steps the next one had to take again."""
    attempts = Attempts(run).read()
    return {before.number: max(0, before.reached - after.from_step) for before, after in itertools.pairwise(attempts)}


def crashes_in_a_row(run: Path) -> int:
    """The most crashes in a row that did not get past one step, as `--checkpoint.crash_limit` counts them."""
    attempts, most = Attempts(run).read()[:-1], 0
    for end in range(1, len(attempts) + 1):
        count = highest = 0
        crashed = itertools.takewhile(lambda attempt: attempt.status in CRASHES, reversed(attempts[:end]))
        for number, attempt in enumerate(crashed, 1):
            if attempt.reached >= highest:
                count, highest = number, attempt.reached
        most = max(most, count)
    return most


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _words(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words


def _rank(process: psutil.Process) -> int | None:
    try:
        return int(process.environ()["RANK"])
    except (psutil.Error, KeyError, ValueError):
        return None
