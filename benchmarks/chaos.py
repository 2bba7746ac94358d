"""Random faults against a running job until the time is up; then it must end as if nothing had happened.

    python benchmarks/chaos.py --minutes 30

A small BERT (random weights, dropout on) learns real texts on gloo processes under `python -m launch run`, with a save
about every second. Ranks and launchers are killed, signalled and stopped, and checkpoints are damaged, at random
moments, many of them in the middle of a save. The next fault comes once the job has taken an optimizer step again. At
the end the run is held against one that nothing disturbed: final weights and curve to the last bit, and every sample.
The exit code is 1 if anything differs, was lost, or needed help. The sample of texts must have been fetched once.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import BertConfig

from benchmarks.chaos_faults import KILLS, KINDS, Fault, recover, strike
from benchmarks.chaos_job import Job, compare, crashes_in_a_row, repeated_steps, step_seconds
from benchmarks.lines import write_line
from toolkit.checkpoint.attempts import Attempts
from toolkit.config import ModelConfig
from toolkit.models import load_tokenizer

CALIBRATION_STEPS = 30
SHARE = 0.45
"""Of the time under faults that the same run may take without them."""
PATIENCE = {"": 180.0, "stop rank": 700.0}
"""Seconds after a fault in which there must be an optimizer step again. A watchdog may wait ten minutes in a phase that
it has not seen often, as the first evaluation."""
PAUSE = (0.5, 8.0)
"""Seconds from a step to the next fault."""
GOAL_SECONDS = 15.0
"""From a kill to the next optimizer step, at the 95th percentile."""


def main() -> None:
    """Calibrate, run undisturbed, run under faults, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="under faults; all takes 2 to 3 times as long")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default: 0)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="by default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result as one line of JSON")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this new folder, and keep it")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with ExitStack() as leave:
        folder = _folder(options.keep, leave)
        chaos = Chaos(folder, options.ranks, leave)
        steps, every = chaos.calibrate(options.minutes * 60)
        say(f"{steps} steps, a save every {every}; now undisturbed …")
        whole = chaos.undisturbed(steps, every)
        say(f"undisturbed: {whole['seconds']:.0f} s. Now {options.minutes:g} minutes of faults, seed {options.seed}")
        result = {"benchmark": "chaos", "minutes": options.minutes, "seed": options.seed, "ranks": options.ranks}
        result |= {"steps": steps, "save_every": every, "undisturbed": whole}
        result |= chaos.disturbed(steps, every, options.minutes * 60, options.kinds, random.Random(options.seed))
        result |= {"load": [round(load, 1) for load in os.getloadavg()], "torch": torch.__version__}
        result |= {"device": f"{os.cpu_count()} cores, {platform.machine()}"}
        show(result)
        write_line(result, options.json)
        raise SystemExit(0 if result["passed"] else 1)


class Chaos:
    """The runs of this benchmark, all alike but for the faults.

    Args:
        folder: for them.
        ranks: of each.
        leave: ends what they have started, however this process ends.
    """

    def __init__(self, folder: Path, ranks: int, leave: ExitStack) -> None:
        self.folder, self.ranks, self._leave = folder, ranks, leave
        self.model = folder / "model"
        tokenizer = load_tokenizer(ModelConfig())
        tokenizer.save_pretrained(self.model)
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=128,
        ).save_pretrained(self.model)  # dropout is 0.1

    def job(self, name: str, steps: int, every: int) -> Job:
        """A job in a folder of that name."""
        options = [
            *("--model.name", str(self.model), "--model.init", "random", "--data.name", "sample:bbc-news"),
            *("--train.global_batch", str(8 * self.ranks), "--train.steps", str(steps), "--optim.lr", "1e-3"),
            *("--precision", "fp32", "--checkpoint.every", str(every)),
            # That many kills in a row, without a step between two of them, are no crash of the job's own.
            *("--checkpoint.crash_limit", "1000"),
        ]
        job = Job(self.folder / name, self.ranks, options)
        self._leave.callback(job.end)
        return job

    def calibrate(self, seconds: float) -> tuple[int, int]:
        """How many steps the run is to have, and how many lie between two saves."""
        job = self.job("calibration", CALIBRATION_STEPS, 10)
        took = _run(job, 300)
        of_steps = step_seconds(job.run)
        step = statistics.median(of_steps)
        left = SHARE * seconds - max(0.0, took - sum(of_steps))
        return max(4 * CALIBRATION_STEPS, int(left / step)), max(1, round(1 / step))

    def undisturbed(self, steps: int, every: int) -> dict[str, Any]:
        """The run that the other one is held against."""
        job = self.job("undisturbed", steps, every)
        took = _run(job, 3600)
        return {"seconds": round(took, 1), "goodput": round(sum(step_seconds(job.run)) / took, 3)}

    def disturbed(
        self, steps: int, every: int, seconds: float, kinds: Sequence[str], rng: random.Random
    ) -> dict[str, Any]:
        """The run under faults, and what became of it."""
        job = self.job("disturbed", steps, every)
        began = time.monotonic()
        faults = self._strike(job, seconds, kinds, rng)
        wall, until = time.monotonic() - began, job.position()[1]
        finished_early = job.finished
        say("no more faults: to the end …")
        job.wait(3600)
        repeated, attempts = repeated_steps(job.run), Attempts(job.run).read()
        for fault in faults:
            first, last = fault.attempts
            fault.repeated = sum(repeated.get(attempt, 0) for attempt in range(first, last + 1))
        explained = {attempt for fault in faults for attempt in range(fault.attempts[0], fault.attempts[1] + 1)}
        result = compare(job.run, self.folder / "undisturbed" / "run") | {
            "goodput": round(sum(step_seconds(job.run)[:until]) / wall, 3),
            "seconds": round(wall, 1),
            "finished_early": finished_early,
            "attempts": len(attempts),
            "starts": len(job.starts),
            "unexplained_attempts": [a.number for a in attempts[:-1] if a.number not in explained],
            "most_crashes_in_a_row": crashes_in_a_row(job.run),
            "summary": summarise(faults),
            "faults": [asdict(fault) for fault in faults],
        }
        equal = result["weights_equal"] and result["curve_equal"] and result["evaluations_equal"]
        sound = not (result["lost"] or result["duplicate"] or result["misplaced"])
        return result | {"passed": equal and sound and not any(fault.error for fault in faults)}

    def _strike(self, job: Job, seconds: float, kinds: Sequence[str], rng: random.Random) -> list[Fault]:
        job.keep_up()
        _until_a_step(job)
        faults: list[Fault] = []
        began = time.monotonic()
        for kind in _draw(kinds, rng):
            _pause(job, rng.uniform(*PAUSE))
            if job.finished or time.monotonic() - began > seconds:
                return faults
            fault, moment, ranks = strike(job, kind, rng)
            fault.at = moment - began
            faults.append(fault)
            recover(job, fault, moment, ranks, PATIENCE.get(kind, PATIENCE[""]))
            say(line(fault, len(faults)))
            if fault.seconds is None:
                job.end()  # and the next start is help
        raise AssertionError


def summarise(faults: Sequence[Fault]) -> list[dict[str, Any]]:
    """Figures of each kind of fault, of all kills, and of all faults."""
    of_kinds = [(kind, [fault for fault in faults if fault.kind == kind]) for kind in KINDS]
    kills = [fault for fault in faults if fault.kind in KILLS]
    saves = [fault for fault in faults if fault.in_save]
    return [
        _figures(*entry)
        for entry in (*of_kinds, ("all in a save", saves), ("all kills", kills), ("all", faults))
        if entry[1]
    ]


def _figures(name: str, faults: Sequence[Fault]) -> dict[str, Any]:
    times = sorted(fault.seconds for fault in faults if fault.seconds is not None)
    phases = [
        (fault.launched, fault.begun - fault.launched, fault.seconds - fault.begun)
        for fault in faults
        if fault.launched is not None and fault.begun is not None and fault.seconds is not None
    ]
    return {
        "kind": name,
        "faults": len(faults),
        "in_save": sum(fault.in_save for fault in faults),
        "survived": sum(not fault.error for fault in faults),
        "repeated_mean": statistics.fmean(fault.repeated for fault in faults),
        "repeated_max": max(fault.repeated for fault in faults),
        "p50": quantile(times, 0.5),
        "p95": quantile(times, 0.95),
        "max": times[-1] if times else None,
        "processor_p50": quantile(sorted(fault.processor for fault in faults if fault.processor), 0.5),
        "phases_p50": [statistics.median(phase) for phase in zip(*phases, strict=True)],
    }


def quantile(values: Sequence[float], share: float) -> float | None:
    """By nearest rank, of values in order."""
    return values[math.ceil(share * len(values)) - 1] if values else None


def show(result: dict[str, Any]) -> None:
    """The table, and below it the verdict."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["fault", "number", "in a\nsave", "survived", "steps repeated\nmean", "\nmax"]
    headings += ["to the next step\np50, s", "\np95", "\nmax", "processor\np50, s"]
    headings += ["of p50: until ranks\nare started", "\nset up", "\nstep"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "fault" else "right", no_wrap=True)
    for row in result["summary"]:
        if row["kind"] == "all in a save":
            table.add_section()
        counts = (str(row[name]) for name in ("faults", "in_save", "survived"))
        times = (
            _seconds(value) for value in (row["p50"], row["p95"], row["max"], row["processor_p50"], *row["phases_p50"])
        )
        table.add_row(row["kind"], *counts, f"{row['repeated_mean']:.1f}", str(row["repeated_max"]), *times)
    console = Console(width=None if sys.stdout.isatty() else 150, markup=False, emoji=False, highlight=False)
    console.print(table)
    for name, verdict in _verdicts(result):
        console.print(f"{name:<28}{verdict}")
    for fault in result["faults"]:
        if fault["error"]:
            console.print(f"\nfault at {fault['at']:.0f} s ({fault['kind']}, {fault['detail']}): {fault['error']}")


def _verdicts(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    faults = result["faults"]
    resumed = sum(not fault["error"] for fault in faults)
    kills = next((row for row in result["summary"] if row["kind"] == "all kills"), None)
    yield "resumed without help", f"{resumed} of {len(faults)}, in {result['attempts']} attempts"
    yield "final weights", "equal bits" if result["weights_equal"] else "DIFFERENT"
    yield "curve", f"{result['steps_equal']} of {result['steps']} steps with equal bits"
    yield "evaluations", "equal bits" if result["evaluations_equal"] else "DIFFERENT"
    yield "samples", "{lost} lost, {duplicate} duplicate, {misplaced} misplaced of {samples}".format(**result)
    if kills and kills["p95"] is not None:
        verdict = "kept" if kills["p95"] <= GOAL_SECONDS else "MISSED"
        yield "kill to the next step, p95", f"{kills['p95']:.1f} s; goal {GOAL_SECONDS:g} s: {verdict}"
    yield "goodput", f"{result['goodput']:.1%} under faults, {result['undisturbed']['goodput']:.1%} undisturbed"
    yield "crashes without progress", f"{result['most_crashes_in_a_row']} in a row at most"
    if result["unexplained_attempts"]:
        yield "ended without a fault", f"attempts {result['unexplained_attempts']}"
    if result["finished_early"]:
        yield "note", "the run was finished before the time was up"


def line(fault: Fault, number: int) -> str:
    """What is shown of a fault while the job goes on."""
    outcome = f"{fault.seconds:5.1f} s to the next step" if fault.seconds is not None else "NOT SURVIVED"
    where = f"step {fault.step}{' in a save' if fault.in_save else ''}"
    return f"{number:4}  {fault.at:6.1f} s  {where:<20} {fault.kind:<14} {fault.detail:<44} {outcome}  {fault.error}"


def say(text: str) -> None:
    """A line for who is waiting."""
    print(text, file=sys.stderr, flush=True)


def _draw(kinds: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Kinds without end, each as often as the others."""
    while True:
        yield from rng.sample(kinds, len(kinds))


def _run(job: Job, seconds: float) -> float:
    began = time.monotonic()
    job.wait(seconds)
    return time.monotonic() - began


def _until_a_step(job: Job) -> None:
    end = time.monotonic() + PATIENCE[""]
    while not job.position()[1]:
        job.keep_up()
        if time.monotonic() > end:
            raise TimeoutError(f"the run does not even start: see {job.output}")
        time.sleep(0.05)


def _pause(job: Job, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not job.finished:
        job.keep_up()
        time.sleep(0.05)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _folder(keep: Path | None, leave: ExitStack) -> Path:
    """Where to work; a temporary folder is kept where something went wrong."""
    if keep:
        keep.mkdir(parents=True)
        return keep.resolve()
    folder = Path(tempfile.mkdtemp(prefix="chaos_"))

    def tidy(kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, SystemExit) and error.code != 1:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            say(f"the runs and what they printed: {folder}")

    leave.push(tidy)
    return folder


if __name__ == "__main__":
    main()
