"""Fine-tuning an encoder on texts: this toolkit's recipe against what a user would write instead.

    python benchmarks/bert_cls_vs_trainer.py
    python benchmarks/bert_cls_vs_trainer.py --lengths articles
    python benchmarks/bert_cls_vs_trainer.py --peer trainer-defaults --rows 704
    python benchmarks/bert_cls_vs_trainer.py --peer loop --lengths uniform --rows 704
    python benchmarks/bert_cls_vs_trainer.py --network bert-base --cuda-graphs --epochs 3 --warm-up 67  # on a GPU

Both fine-tune MiniLM (22.7 M parameters, dropout on), or a network with the shape of BERT-base and random weights, on
the same texts with the same global batch, learning rate and number of steps, each in a process of its own, in turns, on
the GPU where there is one (`export ACCELERATE_USE_CPU=true` for the CPU). The recipe keeps the random order of the
samples and computes in bf16. The peers: the Trainer of transformers at its best (bf16, samples grouped by length, fused
AdamW, a process that loads) or at its defaults (fp32, random order), a loop as in accelerate's examples (bf16), and the
shortest loop (bf16) on batches that were padded before the clock starts.

The texts are news articles cut by whole words: `lognormal` to lengths of mean 61 and at most 256 tokens, `articles` at
256 alone, `uniform` to 64 each. The figure is samples a second over whole epochs, after a few steps to warm up.
Both sides must reach the same loss. MFU is the share of the machine's matrix peak, measured in the same run, that the
products with the model's weights need. The samples of model and texts must have been fetched once.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread itself over all that it sees

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, BertConfig

from benchmarks.device import device, matrix_peak
from benchmarks.side_by_side import (
    Figures,
    add_options,
    in_turns,
    machine,
    median,
    read_run,
    run,
    show,
    summary,
    words,
    write,
)
from toolkit import samples
from toolkit.config import ModelConfig
from toolkit.models import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BATCH, LONGEST, LR = 32, 256, 1e-4
WARM_UP = 6
"""Steps that are not timed, where nothing else is asked for."""
HELD_OUT = 64
GOAL_ON_GPU = 1.5
"""Against the Trainer at its best."""
GOALS = {"trainer-best": 2.0, "trainer-defaults": 7.0, "accelerate": 2.0, "loop": 0.97}
LOSSES_APART = 0.2
"""Largest difference of the losses over the last quarter of the steps: the orders and dropout differ."""


def main() -> None:
    """Measure in turns; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", choices=["lognormal", "articles", "uniform"], default="lognormal")
    parser.add_argument("--peer", choices=list(GOALS), default="trainer-best", help="default: trainer-best")
    parser.add_argument("--network", choices=["minilm", "bert-base"], default="minilm", help="default: minilm")
    parser.add_argument("--tokenizer", help="folder with MiniLM's tokenizer, for bert-base where there is no MiniLM")
    parser.add_argument("--cuda-graphs", action="store_true", help="let the recipe record CUDA graphs")
    parser.add_argument("--rows", type=int, default=2144, help="samples of an epoch (default: 2144, all)")
    parser.add_argument("--epochs", type=int, default=1, help="that are timed (default: 1)")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help=f"steps before them (default: {WARM_UP})")
    add_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bert_cls_vs_trainer_") as name:
        folder = Path(name)
        tokens = write_texts(folder, options.lengths, options.rows, options.tokenizer)
        model = str(samples.fetch("minilm")) if options.network == "minilm" else str(write_network(folder, options))
        weights = weights_of_products(model)
        steps = options.warm_up + options.epochs * math.ceil(options.rows / BATCH)
        sides = {
            "ours": lambda number: ours(folder, number, model, steps, options),
            "peer": lambda number: peer(folder, number, model, steps, options),
        }
        runs = in_turns(sides, options.rounds, "samples_per_second")
    peak = matrix_peak()
    on_gpu = device().type == "cuda"
    result = {"benchmark": "bert_cls_vs_trainer", "lengths": options.lengths, "against": options.peer}
    result |= {"network": options.network, "cuda_graphs": options.cuda_graphs}
    goal = GOAL_ON_GPU if on_gpu and options.peer == "trainer-best" else GOALS[options.peer]
    result |= summary(runs, "samples_per_second", goal)
    flops = 6 * weights * tokens
    losses = {side: median(runs[side], "loss") for side in runs}
    result |= {
        "mfu": {side: round(flops * result[side] / peak, 3) for side in runs},
        "losses": {side: round(loss, 4) for side, loss in losses.items()},
        "same_loss": abs(losses["ours"] - losses["peer"]) <= LOSSES_APART,
        "peak_gib": {side: round(median(runs[side], "peak_bytes") / 2**30, 2) for side in runs},
        "mean_tokens": round(tokens, 1),
        "steps": steps,
        "batch": BATCH,
        "bf16_peak_gflops": round(peak / 1e9),
        **machine(),
    }
    names = {"ours": "recipes/bert_cls.py, bf16" + ", graphs" * options.cuda_graphs, "peer": options.peer}
    show(result, names)
    for what in ("losses", "mfu", "peak_gib"):
        print(f"{what}: {result[what]['ours']} against {result[what]['peer']}")
    write(result, options, names, f"{options.network}, {options.lengths} lengths")
    raise SystemExit(0 if result["same_loss"] else "the losses are apart: the two did not do the same")


def write_network(folder: Path, options: argparse.Namespace) -> Path:
    """One with the shape of BERT-base, random weights and MiniLM's tokenizer, whose vocabulary is the same."""
    torch.manual_seed(0)
    AutoModel.from_config(BertConfig()).save_pretrained(folder / "network")
    load_tokenizer(ModelConfig(name=options.tokenizer or "sample:minilm")).save_pretrained(folder / "network")
    return folder / "network"


def weights_of_products(model: str) -> int:
    """Those of the blocks: 4 h² in attention, 8 h² behind it, where that is four times as wide."""
    config = AutoConfig.from_pretrained(model)
    return int(config.num_hidden_layers * 12 * config.hidden_size**2)


def write_texts(folder: Path, lengths: str, count: int, tokenizer_folder: str | None = None) -> float:
    """News articles, cut so that their tokens are as many as asked for; the mean number of tokens of those to learn."""
    tokenizer = load_tokenizer(ModelConfig(name=tokenizer_folder or "sample:minilm"))
    with (samples.fetch("bbc-news") / "data.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rng = np.random.default_rng(0)
    rng.shuffle(rows)
    if not 0 < count <= len(rows) - HELD_OUT:
        raise SystemExit(f"--rows {count}: choose 1 to {len(rows) - HELD_OUT}")
    wanted = np.clip(rng.lognormal(3.9, 0.7, len(rows)).astype(int), 8, LONGEST)
    wanted = {"lognormal": wanted, "articles": np.full(len(rows), LONGEST), "uniform": np.full(len(rows), 64)}[lengths]
    cut = []
    for row, length in zip(rows, wanted.tolist(), strict=True):
        options = {"return_offsets_mapping": True, "add_special_tokens": False, "verbose": False}
        ends = tokenizer(row["text"], **options)["offset_mapping"][: length - 2]
        cut.append((row["text"][: ends[-1][1]], row["label"], len(ends) + 2))
    half = HELD_OUT // 2
    for name, part in (("train", cut[:count]), ("validation", cut[-HELD_OUT:-half]), ("test", cut[-half:])):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *((text, label) for text, label, _ in part)])
    return statistics.fmean(length for _, _, length in cut[:count])


def ours(folder: Path, number: int, model: str, steps: int, options: argparse.Namespace) -> Figures:
    """One run of the recipe."""
    target = folder / f"ours_{number}"
    more = ["--train.cuda_graphs", "True"] if options.cuda_graphs else []
    run([sys.executable, *recipe(folder, target, model, steps), *more])
    lines, report = read_run(target)
    losses = [line["loss"] for line in lines]
    seconds = [line["step_seconds"] for line in lines]
    loss = statistics.fmean(losses[-max(1, steps // 4) :])
    return figures(seconds[options.warm_up :], loss, report["peak_bytes"])


def recipe(folder: Path, target: Path, model: str, steps: int) -> list[str]:
    """The recipe's command line on the texts in `folder`, as a user writes it."""
    options = {
        "model.name": model,
        "data.name": folder / "train.csv",
        "data.validation": folder / "validation.csv",
        "data.test": folder / "test.csv",
        "data.max_length": LONGEST,
        "train.global_batch": BATCH,
        "train.steps": steps,
        "optim.lr": LR,
        "precision": "bf16",
        "checkpoint.save_model": False,
        "run.dir": target,
        "run.eval_every": steps,
    }
    return [str(ROOT / "recipes" / "bert_cls.py"), *words(options)]


def peer(folder: Path, number: int, model: str, steps: int, options: argparse.Namespace) -> Figures:
    """One run of a peer."""
    printed = run([sys.executable, *peer_script(folder, folder / f"peer_{number}", model, steps, options.peer)])
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return figures(found["seconds"][options.warm_up :], found["loss"], found["peak_bytes"])


def peer_script(folder: Path, target: Path, model: str, steps: int, name: str) -> list[str]:
    """The command line of one of the scripts of `bert_cls_peers.py`."""
    command = [str(ROOT / "benchmarks" / "bert_cls_peers.py"), name, "--model", model]
    command += ["--data", str(folder / "train.csv"), "--output", str(target), "--steps", str(steps)]
    return [*command, "--batch", str(BATCH), "--max-length", str(LONGEST), "--lr", str(LR)]


def figures(timed: list[float], loss: float, peak_bytes: int) -> Figures:
    """Of one run, by the seconds of the steps that are timed."""
    return {"samples_per_second": BATCH * len(timed) / sum(timed), "loss": loss, "peak_bytes": peak_bytes}


if __name__ == "__main__":
    main()
