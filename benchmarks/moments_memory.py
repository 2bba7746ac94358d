"""Memory of AdamW's moments, in fp32 and in 8 bits, and what the network learns with them, side by side.

    python benchmarks/moments_memory.py
    python benchmarks/moments_memory.py --model sample:smollm2 --steps 40

Each optimizer is a process of its own, and they take turns. It trains all weights of a language model for some steps on
pieces of news, the same for all, in bf16 with fp32 weights. Measured are the bytes of the moments; the growth of the
peak memory over what the process held before the first step (resident on a CPU, allocated on a GPU): copies of the
weights, gradients, moments and activations; the milliseconds of an optimizer's step; and the loss of held-out pieces,
before and after. Optimizers that page take part where there is a GPU. The ratios are to `adamw`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.lines import write_line
from benchmarks.low_bit_memory import MIB, forget_the_load
from benchmarks.side_by_side import Figures, machine, median, run
from toolkit import samples
from toolkit.compute import fuse_loss
from toolkit.compute.cross_entropy import IGNORED
from toolkit.config import ModelConfig, OptimConfig
from toolkit.low_bit_optim import LowBitAdamW
from toolkit.memory import peak_bytes
from toolkit.models import load_tokenizer, locate
from toolkit.optim import adamw
from toolkit.precision import Reduced

ON_GPU = torch.cuda.is_available()
SIDES = ("adamw", "adamw-8bit", *(("paged-adamw", "paged-adamw-8bit") if ON_GPU else ()))
HELD_OUT, LENGTH = 8, 128


def main() -> None:
    """Measure in turns; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample:smollm2", help="sample or folder (default: sample:smollm2)")
    parser.add_argument("--steps", type=int, default=20, help="of the optimizer (default: 20)")
    parser.add_argument("--texts", type=int, default=4, help=f"of {LENGTH} tokens in a step (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    given = [f"--{name}={getattr(options, name)}" for name in ("model", "steps", "texts")]
    runs: dict[str, list[Figures]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            found = run([sys.executable, __file__, *given, "--side", side])
            runs[side].append(json.loads(found.splitlines()[-1]))
    names = ("moments_mib", "step_mib", "optimizer_ms", "before", "after")
    figures = {side: {name: round(median(runs[side], name), 4) for name in names} for side in SIDES}
    print(f"{'optimizer':<18}" + "".join(f"{name:>16}" for name in names))
    for side, its in figures.items():
        print(f"{side:<18}" + "".join(f"{its[name]:>16,.3f}" for name in names))
        whole = figures[SIDES[0]]
        its |= {f"{name}_ratio": round(its[name] / whole[name], 4) for name in ("moments_mib", "step_mib")}
    spread = {side: [round(f(r["step_mib"] for r in runs[side]), 1) for f in (min, max)] for side in SIDES}
    result = {"benchmark": "moments_memory", **{name: getattr(options, name) for name in ("model", "steps", "texts")}}
    write_line(
        result | {"rounds": options.rounds, "figures": figures, "step_ranges": spread, **machine()}, options.json
    )


def measure(side: str, options: argparse.Namespace) -> Figures:
    """Some steps in this process."""
    device = torch.device("cuda" if ON_GPU else "cpu")
    pieces = texts(options.model, HELD_OUT + options.steps * options.texts).to(device)
    model: Any = AutoModelForCausalLM.from_pretrained(locate(options.model), dtype=torch.float32).to(device).train()
    assert fuse_loss(model) == ""
    optimizer = adamw(model, OptimConfig(name=side, lr=2e-5))  # type: ignore[arg-type]
    reduced = Reduced(model, torch.bfloat16)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        labels = nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
        total: torch.Tensor = reduced.forward({"input_ids": ids, "labels": labels}).logits.sum()
        return total / ids[:, 1:].numel()

    with torch.no_grad():
        before = loss(pieces[:HELD_OUT]).item()
    reduced.forget()
    forget_the_load()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if ON_GPU else psutil.Process().memory_info().rss
    seconds = []
    for ids in pieces[HELD_OUT:].split(options.texts):
        reduced.backward(loss(ids))
        if ON_GPU:
            torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.step()
        if ON_GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        reduced.forget()
        optimizer.zero_grad()
    step = peak_bytes(device) - held
    with torch.no_grad():
        after = loss(pieces[:HELD_OUT]).item()
    return {
        "moments_mib": moment_bytes(optimizer) / MIB,
        "step_mib": step / MIB,
        "optimizer_ms": sorted(seconds)[len(seconds) // 2] * 1000,
        "before": before,
        "after": after,
    }


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of what an optimizer holds."""
    if isinstance(optimizer, LowBitAdamW):
        return optimizer.state_bytes()
    return sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")


def texts(model: str, count: int) -> torch.Tensor:
    """Pieces of news, (count, length) tokens."""
    tokenizer = load_tokenizer(ModelConfig(name=model), pads=False)
    with (samples.fetch("bbc-news") / "data.jsonl").open(encoding="utf-8") as file:
        ids = itertools.chain.from_iterable(tokenizer(json.loads(line)["text"])["input_ids"] for line in file)
        return torch.tensor(list(itertools.islice(ids, count * LENGTH))).view(count, LENGTH)


if __name__ == "__main__":
    main()
