"""What is left of a run after a fault: this toolkit against the Trainer of transformers, side by side.

    python benchmarks/resume_vs_trainer.py

Both train the same small BERT (random weights) on the same real texts under real `accelerate launch` with two gloo
processes: the same batches, AdamW, a linear schedule, fp32. All ranks are killed between two saves. What that leaves is
copied, and each copy goes on after another fault: as it is, on one process instead of two, with the newest checkpoint
cut in half; where the Trainer needs a hand, it gets one in a run of its own. Each run is then held against the same
tool's own run that nothing disturbed: samples as the ranks consumed them, learning rates, losses, final weights.
Nothing leaves this machine; the samples of tokenizer and texts must have been fetched once.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}

import accelerate
import datasets
import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import BertConfig

from benchmarks.lines import write_line
from benchmarks.resume_figures import (
    Run,
    compare,
    count_samples,
    read_parts,
    reproducible,
    toolkit_curve,
    trainer_curve,
)
from benchmarks.resume_runs import Job, Tool, ToolkitTool, TrainerTool, copy
from toolkit.checkpoint.account import account
from toolkit.config import ModelConfig, TextDataConfig
from toolkit.data import text_classification
from toolkit.models import load_classifier, load_tokenizer

WIDTH = 150
HELD_OUT = 32
"""Samples of the validation and test splits, which only the toolkit looks at."""


@dataclass(frozen=True)
class Fault:
    """What happens between the kill of all ranks and the next start.

    Attributes:
        name: in the result.
        title: in the table.
        ranks: of the next start.
        by_hand: the user does something about the fault that precedes it in the list. The toolkit is not run again
            for that: it needs no hand.
        newest: what happens to the newest checkpoint.
    """

    name: str
    title: str
    ranks: int = 2
    by_hand: bool = False
    newest: Literal["kept", "cut", "removed"] = "kept"


FEWER = (
    Fault("one_process", "1 process instead of 2", ranks=1),
    Fault("one_process_by_hand", "… batch doubled by hand", ranks=1, by_hand=True),
)
HALF = Fault("half_checkpoint", "newest checkpoint cut in half", newest="cut")
FAULTS = (
    Fault("kill", "same command again"),
    *FEWER,
    HALF,
    Fault("half_checkpoint_by_hand", "… removed by hand", by_hand=True, newest="removed"),
)
HEADINGS = (
    *("goes on", "repeated\nsteps", "samples lost\n/ seen again", "steps", "rate differs\n(of the peak)"),
    *("losses equal\n(largest apart)", "final\nweights", "CPU\nseconds"),
)
Row = dict[str, Any]


def main() -> None:
    """Run both tools through all faults; print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half the samples, and the main faults with dropout alone")
    parser.add_argument("--output", type=Path, help="append the JSON line to this file too")
    parser.add_argument("--keep", type=Path, help="do the work in this new folder, and keep it")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    if options.quick:
        plan: dict[float, tuple[Fault, ...]] = {0.1: (FAULTS[0], FEWER[0], HALF)}
    else:
        # Other ranks draw other dropout: only without it can a curve on one process be that of two.
        plan = {0.1: FAULTS, 0.0: FEWER}
    began = time.monotonic()
    rows: list[Row] = []
    with _folder(options.keep) as folder:
        for dropout, faults in plan.items():
            place = folder / f"dropout_{dropout}"
            job, ids = prepare(place, samples=240 if options.quick else 480, dropout=dropout)
            for tool in (TrainerTool(job), ToolkitTool(job)):
                found = measure(tool, place / tool.name, faults, ids)
                rows += [{"tool": tool.name, "dropout": dropout} | row for row in found]
    result = {
        "benchmark": "resume_vs_trainer",
        "runs": rows,
        "steps": job.steps,
        "save_every": job.save_every,
        "global_batch": job.global_batch,
        "samples": job.samples,
        "epochs": job.epochs,
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    show(result)
    write_line(result, options.output)


def prepare(folder: Path, *, samples: int, dropout: float) -> tuple[Job, set[int]]:
    """Write the model and the training rows that both tools read; the job, and the ids of the samples."""
    config = TextDataConfig(train_samples=samples, validation_samples=HELD_OUT, test_samples=HELD_OUT)
    tokenizer = load_tokenizer(ModelConfig())
    data = text_classification(config, tokenizer)
    model, rows = folder / "model", folder / "rows"
    tokenizer.save_pretrained(model)
    BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    ).save_pretrained(model)
    classifier: Any = load_classifier(ModelConfig(name=str(model), init="random"), data.labels, seed=0)
    classifier.save_pretrained(model)
    data.train.remove_columns("length").rename_column("label", "labels").save_to_disk(rows)
    counts = {"train": samples, "validation": HELD_OUT, "test": HELD_OUT}
    job = Job(
        model=model,
        rows=rows,
        data=tuple(word for split, count in counts.items() for word in (f"--data.{split}_samples", str(count))),
        samples=samples,
        ranks=2,
        global_batch=16,
        epochs=3,
        save_every=10 if samples < 300 else 16,
    )
    return job, set(data.train["id"])


def measure(tool: Tool, folder: Path, faults: tuple[Fault, ...], ids: set[int]) -> list[Row]:
    """One tool: its undisturbed run, the kill, and what follows each fault."""
    job = tool.job
    place = folder / "undisturbed"
    ended = tool.run(place, job.ranks)
    if ended.code:
        raise RuntimeError(f"{tool.name} does not even run undisturbed: {ended.error}; see {place / 'output.txt'}")
    whole = read(tool, place)
    # In the middle of an epoch, and some steps after a save.
    after = job.steps // 2 // job.save_every * job.save_every + 3
    killed = folder / "killed"
    tool.kill(killed, after)
    lost, again = count_samples(whole.parts, ids, job.epochs)
    rows: list[Row] = [
        {
            "fault": "none",
            "lost": lost,
            "seen_again": again,
            "last_step": whole.parts[-1].to_step,
            "seconds": round(ended.seconds, 1),
            "cpu_seconds": round(ended.cpu_seconds, 1),
            "reproducible": reproducible(read(tool, killed), whole, after),
            "losses": [round(whole.curve[step][0], 3) for step in (1, len(whole.curve))],
        }
    ]
    own_hands = not isinstance(tool, ToolkitTool)
    for fault in faults:
        if own_hands or not fault.by_hand:
            place = copy(killed, folder / fault.name)
            rows.append({"fault": fault.name} | after_fault(tool, place, fault, whole, ids))
            print(f"{tool.name}, {fault.title}: {rows[-1]['seconds']} s", file=sys.stderr)
    return rows


def after_fault(tool: Tool, place: Path, fault: Fault, whole: Run, ids: set[int]) -> Row:
    """The figures of the killed run in `place`, once the fault has happened and the run is started again."""
    damaged = ""
    if fault.newest == "cut":
        damaged = tool.cut_newest(place)
    elif fault.newest == "removed":
        damaged = tool.remove_newest(place)
    ended = tool.run(place, fault.ranks, same_global_batch=fault.ranks == tool.job.ranks or fault.by_hand)
    row = compare(read(tool, place), whole, ended, ids, tool.job.epochs) | {"damaged": damaged}
    if isinstance(tool, ToolkitTool) and row["resumed"]:
        own = account(place / "run")
        row["own_account"] = {"lost": own.lost, "duplicate": own.duplicate, "misplaced": own.misplaced}
        if (own.lost, own.duplicate) != (row["lost"], row["seen_again"]):
            raise RuntimeError(f"`toolkit checkpoint samples` counts otherwise than this benchmark: {row}")
    return row


def read(tool: Tool, place: Path) -> Run:
    """What the run in `place` has left."""
    ledgers = tool.ledgers(place)
    curve = toolkit_curve(place / "run") if isinstance(tool, ToolkitTool) else trainer_curve(ledgers)
    return Run(read_parts(ledgers), curve, place / "run" / "model" / "model.safetensors")


def show(result: dict[str, Any]) -> None:
    """The table, and below it the errors."""
    rows: list[Row] = result["runs"]
    killed = sorted({row["killed_after_step"] for row in rows if "killed_after_step" in row})
    table = Table(
        title=f"{result['samples']} samples × {result['epochs']} epochs = {result['steps']} steps of "
        f"{result['global_batch']} on 2 processes, a save every {result['save_every']}; "
        f"kill -9 of both after step {' or '.join(map(str, killed))}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("fault", no_wrap=True)
    table.add_column("tool", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for dropout in dict.fromkeys(row["dropout"] for row in rows):
        table.add_section()
        table.add_row(f"dropout {dropout}")
        of_it = [row for row in rows if row["dropout"] == dropout]
        titles = {"none": "none"} | {fault.name: fault.title for fault in FAULTS}
        for name, title in titles.items():
            for row in of_it:
                if row["fault"] == name:
                    table.add_row(title, row["tool"], *_cells(row))
    console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False, highlight=False)
    console.print(table)
    for row in rows:
        if row.get("error"):
            console.print(f"{row['tool']}, {row['fault']}: rc {row['rc']}, {row['error'].partition('. ')[0]}")
        if not row.get("reproducible", True):
            console.print(f"{row['tool']}: runs differ before the kill already, so equal bits mean nothing")


def _cells(row: Row) -> list[str]:
    if row["fault"] == "none":
        counted = f"{row['lost']} / {row['seen_again']}"
        return ["", "", counted, str(row["last_step"]), "", "", "", f"{row['cpu_seconds']:.0f}"]
    if not row["resumed"]:
        return [f"no, rc {row['rc']}", *["–"] * 6, f"{row['cpu_seconds']:.0f}"]
    shared, rates, equal = row["shared_steps"], row["lr_differs"], row["losses_equal"]
    return [
        f"from {row['from_step']}",
        str(row["steps_repeated"]),
        f"{row['lost']} / {row['seen_again']}",
        str(row["last_step"]),
        f"{rates} of {shared}" + (f" ({row['lr_largest_share_of_peak']:.0%})" if rates else ""),
        f"{equal} of {shared}" + (f" ({row['loss_largest_relative']:.1e})" if equal < shared else ""),
        "equal bits" if row["weights_equal"] else f"{row['weights_relative']:.1e} apart",
        f"{row['cpu_seconds']:.0f}",
    ]


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep:
        keep.mkdir(parents=True)
        yield keep.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="resume_vs_trainer_"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
