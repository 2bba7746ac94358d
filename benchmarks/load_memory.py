"""Memory of a node whose ranks load one model, held once or by each of them, until it is laid over the ranks.

    python benchmarks/load_memory.py
    python benchmarks/load_memory.py --ranks 8 --strategy zero3

The ranks load the model in fp32, meet, and lay it over themselves. `shared` is what the toolkit does; `alone` is each
rank with a copy of its own. The figure is the largest sum over the ranks of what they add to the node's memory: shared
pages are counted once (PSS, which Linux knows). What a rank holds before it loads is taken off.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}

import torch

from benchmarks.lines import write_line
from benchmarks.side_by_side import Figures, machine, median
from toolkit import sharing
from toolkit.config import ModelConfig, OptimConfig, StrategyConfig
from toolkit.data.loader import batch_shape
from toolkit.decoders import load_decoder
from toolkit.models import load_tokenizer
from toolkit.optim import adamw
from toolkit.precision import choose_precision
from toolkit.strategies import choose_strategy
from toolkit.world import world

SIDES = ("alone", "shared")
EVERY = 0.02
"""Seconds between two looks at the memory."""


def main() -> None:
    """Measure in turns; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample:smollm2", help="sample or folder (default: sample:smollm2)")
    parser.add_argument("--ranks", type=int, default=4, help="on this node (default: 4)")
    parser.add_argument("--strategy", default="fsdp", choices=["ddp", "fsdp", "zero1", "zero2", "zero3"])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    options = parser.parse_args()
    runs: dict[str, list[Figures]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            runs[side].append(measure(side, options))
    figures = {
        side: {name: round(median(runs[side], name), 3) for name in ("peak_gib", "after_gib", "seconds")}
        for side in SIDES
    }
    print(f"{'':<10}{'peak, GiB':>12}{'laid out, GiB':>16}{'seconds':>10}")
    for side, its in figures.items():
        print(f"{side:<10}{its['peak_gib']:>12.2f}{its['after_gib']:>16.2f}{its['seconds']:>10.1f}")
    ratio = figures["shared"]["peak_gib"] / figures["alone"]["peak_gib"]
    print(f"{ratio:.2f} of the peak")
    spread = {side: [round(f(r["peak_gib"] for r in runs[side]), 3) for f in (min, max)] for side in SIDES}
    result = {"benchmark": "load_memory", "model": options.model, "ranks": options.ranks, "strategy": options.strategy}
    result |= {"figures": figures, "ratio": round(ratio, 3), "peak_ranges": spread, "rounds": options.rounds}
    write_line(result | machine(), options.json)


def measure(side: str, options: argparse.Namespace) -> Figures:
    """One load on all ranks, watched from outside."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    pipes = [context.Pipe() for _ in range(options.ranks)]
    ranks = [
        context.Process(
            target=load, args=(side, rank, options.ranks, port, options.model, options.strategy, end), daemon=True
        )
        for rank, (_, end) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    for here, _ in pipes:
        here.recv()  # all is imported
    pids = [rank.pid for rank in ranks]
    before = held(pids)
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(EVERY):
            peak = max(peak, held(pids))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    for here, _ in pipes:
        here.send("load")
    for here, _ in pipes:
        here.recv()
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    after = held(pids)
    for here, _ in pipes:
        here.send("end")
    for rank in ranks:
        rank.join()
    return {"peak_gib": (peak - before) / 2**30, "after_gib": (after - before) / 2**30, "seconds": seconds}


def held(pids: list[int | None]) -> int:
    """Bytes of the node's memory that these processes hold together."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def load(side: str, rank: int, size: int, port: int, name: str, strategy: str, pipe: Any) -> None:
    """One rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    here = world()
    config = ModelConfig(name=name)
    tokenizer = load_tokenizer(config, pads=False)
    laid = choose_strategy(
        StrategyConfig(name=strategy),
        world=here,
        precision=choose_precision("fp32", here),
        shape=batch_shape(size, 1, size),
        max_grad_norm=None,
    )
    if side == "alone":
        sharing._private_folder = lambda: None  # type: ignore[attr-defined]
    pipe.send("ready")
    pipe.recv()
    model = load_decoder(config, tokenizer, 512, seed=0)
    here.connect()
    here.gather(None)
    sharing.stop_offering()
    laid.setup(model, lambda wrapped: adamw(wrapped, OptimConfig(), 1.0))
    here.gather(None)
    del model
    pipe.send(json.dumps("laid"))
    pipe.recv()
    laid.teardown()
    here.close()


if __name__ == "__main__":
    main()
