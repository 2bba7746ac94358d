"""What the engine costs: a recipe's steady-state step against a bare hand-written PyTorch loop.

    python benchmarks/engine_overhead.py

Both train the same encoder (MiniLM, 22.7 M parameters, dropout on) on the same real batches in the same precision with
fused AdamW and clipping. The toolkit's side is what a recipe does in a step (the loader, `train_step`, the line in
metrics.jsonl, the check for signals); the other side is the shortest loop that one writes by hand, its batches collated
in the loop too. The two take turns, step by step, so that a noisy machine slows both alike; the ratio of the medians is
the figure. Goal: at most 1.03.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import torch

from recipes.bert_cls import Config
from toolkit.config import ModelConfig, RunConfig, TextDataConfig, TrainConfig
from toolkit.data import text_classification
from toolkit.data.loader import epoch_order
from toolkit.engine import train_step
from toolkit.models import load_classifier, load_tokenizer
from toolkit.session import Session
from toolkit.tasks import Classification


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each side (default: 60)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the clock counts (default: 5)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    options = parser.parse_args()
    total = options.steps + options.warmup

    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            model=ModelConfig(),
            data=TextDataConfig(),
            train=TrainConfig(steps=total, global_batch=options.batch, micro_batch=options.batch),
            precision=options.precision,
            run=RunConfig(dir=Path(folder) / "run"),
        )
        seconds = measure(config, total)
    ours, bare = (statistics.median(times[options.warmup :]) for times in seconds)
    pairs = sorted(a / b for a, b in zip(*seconds, strict=True))
    result = {
        "benchmark": "engine_overhead",
        "ratio": round(ours / bare, 4),
        "median_of_paired_ratios": round(statistics.median(pairs), 4),
        "toolkit_ms": round(ours * 1e3, 2),
        "bare_ms": round(bare * 1e3, 2),
        "steps": options.steps,
        "batch": options.batch,
        "precision": options.precision,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


def measure(config: Config, total: int) -> tuple[list[float], list[float]]:
    """Seconds of each step of the toolkit and of the bare loop, in turns."""
    tokenizer = load_tokenizer(config.model)
    data = text_classification(config.data, tokenizer)
    task = Classification(data.labels, tokenizer)
    with Session("bert_cls", config) as session:
        session.console.quiet = True
        model = load_classifier(config.model, data.labels, seed=0)
        train, _, _ = session.loaders(task, data.train, data.validation, data.test)
        session.setup(model, tokenizer=tokenizer, data_fingerprint=data.fingerprint, plan={})
        bare = bare_loop(config, data, tokenizer, session.schedule)
        ours_times, bare_times = [], []
        steps = session.steps(train)
        for number in range(total):
            # Who goes first alternates too.
            for side in (0, 1) if number % 2 else (1, 0):
                began = time.perf_counter()
                if side == 0:
                    step = next(steps)
                    rate = session.schedule(step.number)
                    session.log(step, train_step(session.strategy, task, step, learning_rate=rate, seed=0))
                    ours_times.append(time.perf_counter() - began)
                else:
                    next(bare)
                    bare_times.append(time.perf_counter() - began)
        list(steps)
    return ours_times, bare_times


def bare_loop(config: Config, data: object, tokenizer: object, schedule: object) -> Iterator[float]:
    """The shortest training loop, one step at each `next`."""
    model = load_classifier(config.model, data.labels, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    rows, number, epoch = data.train, 0, 0
    while True:
        order = epoch_order(0, epoch, len(rows)).tolist()
        for start in range(0, len(order), config.train.global_batch):
            columns = rows[order[start : start + config.train.global_batch]]
            batch = tokenizer.pad({"input_ids": columns["input_ids"]}, return_tensors="pt")
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                loss = model(**batch, labels=torch.tensor(columns["label"])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            number += 1
            for group in optimizer.param_groups:
                group["lr"] = schedule(number)
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()
        epoch += 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
