"""Fine-tuning on texts of ragged lengths: this toolkit's recipe against the Trainer of transformers.

    python benchmarks/bert_cls_vs_trainer.py
    python benchmarks/bert_cls_vs_trainer.py --lengths articles --peer defaults

Both fine-tune MiniLM (22.7 M parameters, dropout on) on the same texts with the same global batch, learning rate and
number of steps, each in a process of its own, in turns. The recipe keeps the random order of the samples. The Trainer
is at its best: bf16, samples grouped by length, fused AdamW, a process that loads; or at its defaults: fp32, random
order. `lognormal` are news articles cut to lengths of mean 61 and at most 256 tokens, `articles` the same cut at 256
alone. The figure is samples a second over all steps but the first five, the ratio of the medians over the rounds.
Both must reach the same loss. The samples of model and texts must have been fetched once.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}

import numpy as np
import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

from toolkit import samples
from toolkit.config import ModelConfig
from toolkit.models import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BATCH, LONGEST, LR = 32, 256, 1e-4
WARM_UP = 5
GOALS = {"best": 2.0, "defaults": 7.0}
LOSSES_APART = 0.15
"""Largest difference of the losses over the last quarter of the steps: the orders and dropout differ."""


def main() -> None:
    """Measure in turns; print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", choices=["lognormal", "articles"], default="lognormal")
    parser.add_argument("--peer", choices=list(GOALS), default="best", help="settings of the Trainer (default: best)")
    parser.add_argument("--steps", type=int, default=40, help="of each run (default: 40)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the JSON line to this file too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a bar chart")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bert_cls_vs_trainer_") as name:
        folder = Path(name)
        texts = write_texts(folder / "texts.csv", options.lengths)
        model = str(samples.fetch("minilm"))
        sides: dict[str, Callable[[int], dict[str, Any]]] = {
            "ours": lambda number: ours(folder / f"ours_{number}", model, texts, options.steps),
            "peer": lambda number: trainer(folder / f"peer_{number}", model, texts, options.steps, options.peer),
        }
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for number in range(options.rounds):
            for side, run in sides.items():
                runs[side].append(run(number))
                rate = runs[side][-1]["samples_per_second"]
                print(f"round {number + 1}, {side}: {rate:.1f} samples/s", file=sys.stderr, flush=True)
    result = summarise(runs, options)
    show(result)
    line = json.dumps(result)
    print(line)
    if options.json:
        with options.json.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    if options.plot:
        plot(result, options.plot)
    raise SystemExit(0 if result["same_loss"] else 1)


def write_texts(path: Path, lengths: str) -> Path:
    """News articles, cut by whole words so that their tokens are as many as asked for."""
    tokenizer = load_tokenizer(ModelConfig())
    with (samples.fetch("bbc-news") / "data.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rng = np.random.default_rng(0)
    wanted = np.clip(rng.lognormal(3.9, 0.7, len(rows)).astype(int), 8, LONGEST)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row, length in zip(rows, wanted.tolist(), strict=True):
            text = row["text"]
            if lengths == "lognormal":
                ends = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
                text = text[: ends[min(length - 2, len(ends)) - 1][1]]
            writer.writerow([text, row["label"]])
    return path


def ours(folder: Path, model: str, texts: Path, steps: int) -> dict[str, Any]:
    """The recipe, as a user starts it."""
    options = {
        "model.name": model,
        "data.name": texts,
        "data.max_length": LONGEST,
        "data.validation_share": 0.02,
        "data.test_share": 0.02,
        "train.global_batch": BATCH,
        "train.steps": steps,
        "optim.lr": LR,
        "precision": "bf16",
        "checkpoint.save_model": False,
        "run.dir": folder,
        "run.eval_every": steps,
    }
    command = [sys.executable, str(ROOT / "recipes" / "bert_cls.py")]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    _run(command)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    return _figures([BATCH / line["samples_per_second"] for line in lines], statistics.fmean(losses[-(steps // 4) :]))


def trainer(folder: Path, model: str, texts: Path, steps: int, settings: str) -> dict[str, Any]:
    """The Trainer's script."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bert_cls_trainer.py"), "--model", model]
    command += ["--data", str(texts), "--output", str(folder), "--settings", settings, "--steps", str(steps)]
    command += ["--batch", str(BATCH), "--max-length", str(LONGEST), "--lr", str(LR)]
    found = json.loads(_run(command).splitlines()[-1])
    return _figures(found["seconds"], found["loss"])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _figures(seconds: list[float], loss: float) -> dict[str, Any]:
    timed = seconds[WARM_UP:]
    return {"samples_per_second": BATCH * len(timed) / sum(timed), "loss": loss}


def summarise(runs: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians, their ratio, and whether both learnt alike."""
    rates = {side: sorted(run["samples_per_second"] for run in found) for side, found in runs.items()}
    losses = {side: statistics.median(run["loss"] for run in found) for side, found in runs.items()}
    ours, peer = (statistics.median(rates[side]) for side in ("ours", "peer"))
    return {
        "benchmark": "bert_cls_vs_trainer",
        "lengths": options.lengths,
        "settings_of_peer": options.peer,
        "ours": round(ours, 2),
        "peer": round(peer, 2),
        "ratio": round(ours / peer, 3),
        "goal": GOALS[options.peer],
        "ranges": {side: [round(found[0], 2), round(found[-1], 2)] for side, found in rates.items()},
        "losses": {side: round(loss, 4) for side, loss in losses.items()},
        "same_loss": abs(losses["ours"] - losses["peer"]) <= LOSSES_APART,
        "steps": options.steps,
        "rounds": options.rounds,
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def show(result: dict[str, Any]) -> None:
    """The table, and below it the goal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "samples/s", "from – to", "loss, last quarter"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for side, name in (("ours", "recipes/bert_cls.py, bf16"), ("peer", f"Trainer, {result['settings_of_peer']}")):
        low, high = result["ranges"][side]
        table.add_row(name, f"{result[side]:.1f}", f"{low:.1f} – {high:.1f}", f"{result['losses'][side]:.3f}")
    console = Console(width=None if sys.stdout.isatty() else 100, markup=False, emoji=False, highlight=False)
    console.print(table)
    verdict = "kept" if result["ratio"] >= result["goal"] else "MISSED"
    console.print(f"{result['lengths']} lengths: {result['ratio']:.2f} times; goal {result['goal']:g}: {verdict}")
    if not result["same_loss"]:
        console.print("the losses are apart: the two did not do the same")


def plot(result: dict[str, Any], path: Path) -> None:
    """Both sides as bars, with the spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    names = ["toolkit", f"Trainer, {result['settings_of_peer']}"]
    values = [result[side] for side in ("ours", "peer")]
    spread = [
        [value - result["ranges"][side][0] for side, value in zip(("ours", "peer"), values, strict=True)],
        [result["ranges"][side][1] - value for side, value in zip(("ours", "peer"), values, strict=True)],
    ]
    axes.barh(names[::-1], values[::-1], xerr=[part[::-1] for part in spread], color=["#999999", "#3069b5"], capsize=3)
    axes.set_xlabel("samples a second (median; from – to)")
    axes.set_title(f"MiniLM, {result['lengths']} lengths: {result['ratio']:.2f} times")
    figure.savefig(path)


if __name__ == "__main__":
    main()
