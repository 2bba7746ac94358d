"""What is left of a run after a fault: this toolkit against the Trainer of transformers, side by side.

    python benchmarks/resume_vs_trainer.py

Both train the same small BERT (random weights, dropout on) on the same real texts under real `accelerate launch` with
two gloo processes: same batches of 16, AdamW, linear schedule, fp32. All ranks are killed between two saves; what
that leaves is copied, and each copy goes on under another fault: as it is, on one process instead of two, with the
newest checkpoint cut in half. Each run is then held against the same tool's own run that nothing disturbed: samples
as its ranks consumed them, learning rates, losses and final weights. Everything stays on this machine; the two
samples (tokenizer and texts) must have been fetched once.
"""

from __future__ import annotations

import argparse
import json
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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}

import accelerate
import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import BertConfig

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


@dataclass(frozen=True)
class Fault:
    """What happens between the kill of all ranks and the next start.

    Attributes:
        name: in the result.
        title: in the table.
        ranks: of the next start.
        same_global_batch: whether the user sees to it; the toolkit does it anyway.
        damage: whether the newest checkpoint is cut.
    """

    name: str
    title: str
    ranks: int = 2
    same_global_batch: bool = True
    damage: bool = False


FAULTS = (
    Fault("kill", "kill -9, same command"),
    Fault("one_rank", "kill -9, same command on 1 process", ranks=1, same_global_batch=False),
    Fault("one_rank_same_batch", "… and its batch doubled by hand", ranks=1),
    Fault("half_checkpoint", "kill -9, newest checkpoint half there", damage=True),
)


def main() -> None:
    """Run both tools through all faults; print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half the samples, the first and the last fault alone")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the network (default: 0.1)")
    parser.add_argument("--output", type=Path, help="append the JSON line to this file too")
    parser.add_argument("--keep", type=Path, help="do the work in this new folder, and keep it")
    options = parser.parse_args()
    faults = (FAULTS[0], FAULTS[-1]) if options.quick else FAULTS
    began = time.monotonic()
    with _folder(options.keep) as folder:
        job, ids = prepare(folder, samples=96 if options.quick else 192, dropout=options.dropout)
        tools = {
            tool.name: measure(tool, folder / tool.name, faults, ids) for tool in (TrainerTool(job), ToolkitTool(job))
        }
    result = {
        "benchmark": "resume_vs_trainer",
        "tools": tools,
        "steps": job.steps,
        "save_every": job.save_every,
        "global_batch": job.global_batch,
        "samples": job.samples,
        "epochs": job.epochs,
        "dropout": options.dropout,
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    show(result, faults)
    line = json.dumps(result)
    print(line)
    if options.output:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def prepare(folder: Path, *, samples: int, dropout: float) -> tuple[Job, set[int]]:
    """Write the model and the training rows that both tools read; the job, and the ids of the samples."""
    held_out = 32
    config = TextDataConfig(train_samples=samples, validation_samples=held_out, test_samples=held_out)
    tokenizer = load_tokenizer(ModelConfig())
    data = text_classification(config, tokenizer)
    model = folder / "model"
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
    load_classifier(ModelConfig(name=str(model), init="random"), data.labels, seed=0).save_pretrained(model)
    rows = folder / "rows"
    data.train.remove_columns("length").rename_column("label", "labels").save_to_disk(rows)
    job = Job(
        model=model,
        rows=rows,
        data=tuple(
            word
            for split in ("train", "validation", "test")
            for word in (f"--data.{split}_samples", str(samples if split == "train" else held_out))
        ),
        samples=samples,
        ranks=2,
        global_batch=16,
        epochs=3,
        save_every=4 if samples < 100 else 8,
    )
    return job, set(data.train["id"])


def measure(tool: Tool, folder: Path, faults: tuple[Fault, ...], ids: set[int]) -> dict[str, Any]:
    """One tool: its undisturbed run, the kill, and what follows each fault."""
    job = tool.job
    place = folder / "undisturbed"
    ended = tool.run(place, job.ranks)
    if ended.code:
        raise RuntimeError(f"{tool.name} does not even run undisturbed: {ended.error}; see {place / 'output.txt'}")
    whole = read(tool, place)
    lost, again = count_samples(whole.parts, ids, job.epochs)
    # In the middle of an epoch, and two steps after a save.
    after = job.steps // 2 // job.save_every * job.save_every + 2
    killed = folder / "killed"
    tool.kill(killed, after)
    figures: dict[str, Any] = {
        "undisturbed": {
            "last_step": whole.parts[-1].to_step,
            "lost": lost,
            "seen_again": again,
            "seconds": round(ended.seconds, 1),
        },
        "reproducible": reproducible(read(tool, killed), whole, after),
    }
    for fault in faults:
        if isinstance(tool, ToolkitTool) and fault.name == "one_rank_same_batch":
            continue  # the command before it does so
        place = copy(killed, folder / fault.name)
        cut = tool.damage(place) if fault.damage else ""
        ended = tool.run(place, fault.ranks, same_global_batch=fault.same_global_batch)
        figures[fault.name] = compare(read(tool, place), whole, ended, ids, job.epochs)
        if cut:
            figures[fault.name]["cut"] = cut
        if isinstance(tool, ToolkitTool):
            check_account(place / "run", figures[fault.name])
    return figures


def read(tool: Tool, place: Path) -> Run:
    """What the run in `place` has left."""
    ledgers = tool.ledgers(place)
    curve = toolkit_curve(place / "run") if isinstance(tool, ToolkitTool) else trainer_curve(ledgers)
    return Run(read_parts(ledgers), curve, place / "run" / "model" / "model.safetensors")


def check_account(run: Path, figures: dict[str, Any]) -> None:
    """The toolkit's own account of its samples must say what is counted here for both tools alike."""
    own = account(run)
    figures["own_account"] = {"lost": own.lost, "duplicate": own.duplicate, "misplaced": own.misplaced}
    if figures["resumed"] and (own.lost, own.duplicate) != (figures["lost"], figures["seen_again"]):
        raise RuntimeError(f"toolkit checkpoint samples counts otherwise: {figures}")


def show(result: dict[str, Any], faults: tuple[Fault, ...]) -> None:
    """The table."""
    samples, epochs, steps = result["samples"], result["epochs"], result["steps"]
    table = Table(
        title=f"{samples} samples × {epochs} epochs = {steps} steps of {result['global_batch']}, "
        f"a save every {result['save_every']}, dropout {result['dropout']}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("fault")
    table.add_column("tool")
    for heading in ("resumed", "repeated\nsteps", "samples lost\n/ seen again", "steps\nof the run"):
        table.add_column(heading, justify="right")
    for heading in ("learning rate differs\nat, by (of the peak)", "losses equal\nat, largest apart", "final\nweights"):
        table.add_column(heading, justify="right")
    for name, figures in result["tools"].items():
        plain = figures["undisturbed"]
        counted = f"{plain['lost']} / {plain['seen_again']}"
        table.add_row("none", name, "", "", counted, str(plain["last_step"]), "", "", "")
    errors = []
    for fault in faults:
        table.add_section()
        for name, figures in result["tools"].items():
            if fault.name in figures:
                table.add_row(fault.title, name, *_cells(figures[fault.name]))
                if figures[fault.name]["error"]:
                    errors.append(
                        f"{name}, {fault.title}: rc {figures[fault.name]['rc']}, {figures[fault.name]['error']}"
                    )
    console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False, highlight=False)
    console.print(table)
    for error in errors:
        console.print(error)
    for name, figures in result["tools"].items():
        if not figures["reproducible"]:
            console.print(f"{name}: two runs differ before the kill already, so equal bits mean nothing")


def _cells(figures: dict[str, Any]) -> list[str]:
    if not figures["resumed"]:
        return ["no", *["–"] * 6]
    shared = figures["shared_steps"]
    rates, equal = figures["lr_differs"], figures["losses_equal"]
    return [
        f"from {figures['from_step']}",
        str(figures["steps_repeated"]),
        f"{figures['lost']} / {figures['seen_again']}",
        str(figures["last_step"]),
        f"{rates} of {shared}" + (f", {figures['lr_largest_share_of_peak']:.0%}" if rates else ""),
        f"{equal} of {shared}" + (f", {figures['loss_largest_relative']:.1e}" if equal < shared else ""),
        "equal bits" if figures["weights_equal"] else f"{figures['weights_relative']:.1e} apart",
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
