"""Both tools of `resume_vs_trainer.py` as real processes: how each is started, watched and killed.

A `Place` is the folder that one run is started in. Both tools are started there by `accelerate launch` with the same
configuration, and both write into its subfolder `run`, so that the same command can be given again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300.0
"""Seconds after which a launch that has not ended is killed, and counts as failed."""
KILLS = 3
"""How often to try to kill a run between two saves."""
_ERROR = re.compile(r"^(?:\[rank ?\d+\]:? )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)")


@dataclass(frozen=True)
class Job:
    """What both tools are to do, in words that both know.

    Attributes:
        model: folder with weights and a tokenizer.
        rows: data set on disk with the training samples that the toolkit's settings `data` lead to.
        data: options of the recipe that name the data.
        ranks: processes of a run that is not disturbed.
        global_batch, epochs, save_every, lr, seed: alike for both.
    """

    model: Path
    rows: Path
    data: tuple[str, ...]
    samples: int
    ranks: int
    global_batch: int
    epochs: int
    save_every: int
    lr: float = 3e-3
    weight_decay: float = 0.01
    seed: int = 0

    @property
    def steps(self) -> int:
        """Of the whole run; epochs have no ragged end, which the Trainer would fill up with samples seen before."""
        return self.samples // self.global_batch * self.epochs


@dataclass(frozen=True)
class Ended:
    """How a launch ended.

    Attributes:
        code, error: exit code of the launcher, and the exception behind it in one line.
        seconds: on the clock, which others on the machine slow down.
        cpu_seconds: of the launcher and all ranks.
    """

    code: int
    error: str
    seconds: float
    cpu_seconds: float


class Tool(ABC):
    """One of the two sides.

    Args:
        job: what to do.
    """

    name: str

    def __init__(self, job: Job) -> None:
        self.job = job

    @abstractmethod
    def command(self, ranks: int, *, same_global_batch: bool) -> list[str]:
        """Script and options, to be started on that many ranks."""

    @abstractmethod
    def step(self, place: Path) -> int:
        """The last step that the run in `place` is known to have done."""

    @abstractmethod
    def checkpoints(self, place: Path) -> dict[int, Path]:
        """Complete checkpoints of the run in `place`, by step."""

    @abstractmethod
    def ledgers(self, place: Path) -> Path:
        """Folder with one folder for each start, with what each rank consumed."""

    def run(self, place: Path, ranks: int, *, same_global_batch: bool = True) -> Ended:
        """Start the run in `place`, or go on with it, and wait for its end."""
        return self._launch(place, ranks, same_global_batch, lambda launcher: None)

    def kill(self, place: Path, after: int) -> None:
        """Start the run in `place` and kill all ranks once step `after` is done and the save before it is whole.

        Where a busy machine lets them get to the next save first, all of it is done again.

        Raises:
            RuntimeError: three times in a row they got there, or the run failed.
        """
        saved = after // self.job.save_every * self.job.save_every
        for _ in range(KILLS):
            ended = self._launch(place, self.job.ranks, True, lambda launcher: self._strike(launcher, place, after))
            checkpoints = self.checkpoints(place)
            if ended.code and checkpoints and max(checkpoints) == saved:
                return
            if ended.code and self.step(place) < after:
                raise RuntimeError(f"{self.name} did not come as far as step {after}: {ended.error}")
            shutil.rmtree(place)
        raise RuntimeError(f"{self.name} could not be killed between two saves: its steps are too short")

    def _strike(self, launcher: subprocess.Popen[bytes], place: Path, after: int) -> None:
        saved, end = after // self.job.save_every * self.job.save_every, time.monotonic() + PATIENCE
        while self.step(place) < after or saved not in self.checkpoints(place):
            if launcher.poll() is not None or time.monotonic() > end:
                return
            time.sleep(0.002)
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ended by itself in this moment was missed
            for rank in psutil.Process(launcher.pid).children():
                rank.kill()

    def cut_newest(self, place: Path) -> str:
        """Cut the largest file of the newest checkpoint in half; which one it was."""
        checkpoints = self.checkpoints(place)
        largest = max(checkpoints[max(checkpoints)].rglob("*"), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
        return f"{largest.parent.name}/{largest.name}"

    def remove_newest(self, place: Path) -> str:
        """Remove the newest checkpoint; which one it was."""
        checkpoints = self.checkpoints(place)
        newest = checkpoints[max(checkpoints)]
        shutil.rmtree(newest)
        return newest.name

    def _launch(
        self, place: Path, ranks: int, same_global_batch: bool, meanwhile: Callable[[subprocess.Popen[bytes]], None]
    ) -> Ended:
        (place / "run").mkdir(parents=True, exist_ok=True)
        record = self._new_record(place)
        began, cpu = time.monotonic(), _cpu_seconds()
        with (place / "output.txt").open("wb") as output:
            launcher = subprocess.Popen(
                [*_accelerate(ranks), *self.command(ranks, same_global_batch=same_global_batch)],
                cwd=place,
                env=_environment() | record,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                meanwhile(launcher)
                code = launcher.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                code = 124
            finally:
                _end(launcher)
        error = "" if code == 0 else _error(place / "output.txt")
        return Ended(code, error, time.monotonic() - began, _cpu_seconds() - cpu)

    def _new_record(self, place: Path) -> dict[str, str]:
        """The environment that tells a start where to write what it consumes."""
        return {}


class TrainerTool(Tool):
    """`transformers.Trainer` with its defaults."""

    name = "Trainer"

    def command(self, ranks: int, *, same_global_batch: bool) -> list[str]:
        """A batch is set for each process here, so a user who keeps the global one must change the command."""
        job = self.job
        return [
            str(ROOT / "benchmarks" / "trainer_job.py"),
            *("--model", str(job.model), "--rows", str(job.rows), "--output", "run"),
            *(
                "--epochs",
                str(job.epochs),
                "--batch",
                str(job.global_batch // (ranks if same_global_batch else job.ranks)),
            ),
            *("--lr", str(job.lr), "--weight-decay", str(job.weight_decay)),
            *("--seed", str(job.seed), "--save-steps", str(job.save_every)),
        ]

    def step(self, place: Path) -> int:
        """From what rank 0 has recorded."""
        attempts = sorted(self.ledgers(place).glob("attempt_*"))
        return _last_step(attempts[-1] / "rank_00000.jsonl") if attempts else 0

    def checkpoints(self, place: Path) -> dict[int, Path]:
        """Those with the file that is written last."""
        found = (place / "run").glob("checkpoint-*/trainer_state.json")
        return {int(path.parent.name.removeprefix("checkpoint-")): path.parent for path in found}

    def ledgers(self, place: Path) -> Path:
        """Beside the run."""
        return place / "record"

    def _new_record(self, place: Path) -> dict[str, str]:
        number = len(list(self.ledgers(place).glob("attempt_*"))) + 1
        folder = self.ledgers(place) / f"attempt_{number:04d}"
        folder.mkdir(parents=True)
        return {"RESUME_BENCHMARK_RECORD": str(folder)}


class ToolkitTool(Tool):
    """The recipe `bert_cls`."""

    name = "toolkit"

    def command(self, ranks: int, *, same_global_batch: bool) -> list[str]:
        """The same on any number of ranks: the batch is the global one."""
        job = self.job
        return [
            str(ROOT / "recipes" / "bert_cls.py"),
            *("--model.name", str(job.model), *job.data),
            *("--train.epochs", str(job.epochs), "--train.global_batch", str(job.global_batch)),
            *("--optim.lr", str(job.lr), "--optim.weight_decay", str(job.weight_decay), "--optim.warmup_steps", "0"),
            *("--precision", "fp32", "--checkpoint.every", str(job.save_every)),
            *("--run.dir", "run", "--run.seed", str(job.seed)),
        ]

    def step(self, place: Path) -> int:
        """From the run's metrics."""
        return _last_step(place / "run" / "metrics.jsonl")

    def checkpoints(self, place: Path) -> dict[int, Path]:
        """Those that are committed."""
        found = (place / "run" / "checkpoints").glob("step_*")
        return {int(path.name.removeprefix("step_")): path for path in found}

    def ledgers(self, place: Path) -> Path:
        """In the run."""
        return place / "run" / "samples"


def copy(place: Path, to: Path) -> Path:
    """The state that a kill left, for another fault to begin with."""
    shutil.copytree(place, to, symlinks=True)
    return to


def _accelerate(ranks: int) -> list[str]:
    file = ROOT / "configs" / "accelerate" / "cpu2.yaml"
    return [
        *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)),
        # One thread for each process on any number of them: the sums of two threads differ in the last bits.
        *("--num_processes", str(ranks), "--num_cpu_threads_per_process", "1", "--main_process_port", "0"),
    ]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "OMP_"))}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | {"ACCELERATE_USE_CPU": "true"} | offline


def _cpu_seconds() -> float:
    """Of all processes that were started from here and have ended."""
    times = os.times()
    return times.children_user + times.children_system


def _end(launcher: subprocess.Popen[bytes]) -> None:
    """Nothing that was started here outlives its launch. A launcher that ends by itself takes its ranks along."""
    if launcher.poll() is not None:
        return
    for process in [*psutil.Process(launcher.pid).children(recursive=True), launcher]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    launcher.wait()


def _last_step(path: Path) -> int:
    """Of a file of lines that is being written."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return 0
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _error(output: Path) -> str:
    """The exception that ended the first rank which had one, in one line."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [match[1] for line in lines if (match := _ERROR.match(line)) and "ChildFailedError" not in line]
    return (found[0] if found else next((line for line in reversed(lines) if re.search(r"\w", line)), ""))[:300]
