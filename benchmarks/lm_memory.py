"""Memory of a language model's loss, forward and backward: in chunks as here, and with all logits at once.

    python benchmarks/lm_memory.py
    python benchmarks/lm_memory.py --vocabulary 32768 --tokens 2048

Hidden states and a weight of the head, of random numbers, and a label for each token. Ours: `linear_cross_entropy`.
The peer: torch's `cross_entropy` of the logits in fp32. Each run is a process of its own, and both sides take turns;
measured are the growth of the peak resident memory over what the process held before the loss (its inputs, and the
libraries, warm from a loss of a few tokens), and the seconds. Both must give the same loss and gradients.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from torch.nn.functional import cross_entropy, linear

from benchmarks.side_by_side import Figures, add_options, in_turns, machine, median, run, show, summary, write
from toolkit.compute import linear_cross_entropy
from toolkit.memory import peak_bytes

GOAL = 0.25
"""Largest share of the peer's memory."""
APART = 0.01
"""Largest difference of the losses and of the norms of the gradients, relative: bf16 rounds in different places."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Measure in turns; print a table and one line of JSON for each vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [2**15, 2**17]
    parser.add_argument("--vocabulary", type=int, nargs="+", default=sizes, help=f"words (default: {sizes})")
    parser.add_argument("--tokens", type=int, default=4096, help="with a label that counts (default: 4096)")
    parser.add_argument("--width", type=int, default=576, help="of the hidden states (default: 576)")
    parser.add_argument("--precision", choices=DTYPES, default="bf16", help="of hidden states and weight")
    parser.add_argument("--side", choices=list(LOSSES), help=argparse.SUPPRESS)
    add_options(parser, rounds=3)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.vocabulary[0], options)))
        return
    for vocabulary in options.vocabulary:
        compare(vocabulary, options)


def compare(vocabulary: int, options: argparse.Namespace) -> None:
    """One vocabulary."""
    sizes = {"vocabulary": vocabulary, "tokens": options.tokens, "width": options.width, "precision": options.precision}
    given = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]

    def process(side: str) -> Callable[[int], Figures]:
        command = [sys.executable, __file__, *given, "--side", side]
        return lambda number: dict(json.loads(run(command).splitlines()[-1]))

    runs = in_turns({side: process(side) for side in LOSSES}, options.rounds, "peak_mib")
    for figure in ("loss", "norms"):
        ours, peer = (torch.tensor(runs[side][0][figure]) for side in LOSSES)
        if bool(((ours - peer).abs() > APART * peer).any()):
            raise SystemExit(f"the sides are apart: {figure} {ours.tolist()} and {peer.tolist()}")
    result: Figures = {"benchmark": "lm_memory", "against": "all logits at once", **sizes}
    result |= summary(runs, "peak_mib", GOAL, smaller=True)
    result |= {"seconds": {side: round(median(runs[side], "seconds"), 2) for side in LOSSES}, **machine()}
    names = {"ours": "in chunks", "peer": "all logits at once"}
    show(result, names, digits=0)
    print("seconds: {ours} in chunks, {peer} with all logits".format(**result["seconds"]))
    write(result, options, names, f"{vocabulary} words")


def measure(side: str, vocabulary: int, options: argparse.Namespace) -> Figures:
    """One forward and backward in this process."""
    torch.manual_seed(0)
    cpu, dtype = torch.device("cpu"), DTYPES[options.precision]
    hidden = torch.randn(options.tokens, options.width, dtype=dtype, requires_grad=True)
    weight = torch.empty(vocabulary, options.width, dtype=dtype).normal_(std=0.05).requires_grad_()
    labels = torch.randint(vocabulary, (options.tokens,))
    step(
        side,
        hidden.detach()[:2].clone().requires_grad_(),
        weight.detach()[:100].clone().requires_grad_(),
        labels[:2] % 100,
    )
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    loss = step(side, hidden, weight, labels)
    seconds, peak = time.perf_counter() - began, peak_bytes(cpu) - before
    assert hidden.grad is not None
    assert weight.grad is not None
    norms = [float(gradient.float().norm()) for gradient in (hidden.grad, weight.grad)]
    return {"peak_mib": peak / 2**20, "seconds": seconds, "loss": loss, "norms": norms}


def step(side: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> float:
    """Forward and backward."""
    loss = LOSSES[side](hidden, weight, labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As one would write it."""
    return cross_entropy(linear(hidden, weight).float(), labels, reduction="sum")


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "ours": linear_cross_entropy,
    "peer": plain,
}


if __name__ == "__main__":
    main()
