"""Instruction tuning of SmolLM2-135M: this toolkit's recipe against TRL's SFTTrainer.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/sft_vs_trl.py
    python benchmarks/sft_vs_trl.py --peer trl-packed
    python benchmarks/sft_vs_trl.py --full

Both tune the same weights on the same conversations in bf16, with LoRA of the same rank in the same layers or, with
`--full`, all of them in fp32; the same fused AdamW, learning rates and number of steps, and a step of as many
conversations (packed: of as many rows as hold as many tokens, rounded), over an epoch and a few steps to warm up. Both
learn the answers and the token that ends each. Each run is a process of its own, in turns.

The recipe takes the conversations in the seed's order. TRL, at its best without activation checkpointing: `trl-padded`
groups them by length, which needs some hundred of them, and pads; like the recipe it takes `--micro-batch` to a forward
pass. `trl-packed` packs them (best-fit decreasing) into rows and takes one row to a forward pass. TRL's packing is made
for FlashAttention. Without it, which is so on a CPU and by default on a GPU, transformers keeps the conversations of a
row apart by a mask of the whole row, found from the positions: the numbers are right, as the held-out losses show, and
attention is paid for the whole row. Without Triton, as on a CPU, TRL's output layer scores every position, learnt or
not, and multiplies in fp32 where it computes gradients.

The figure is tokens a second after the warm-up: all tokens of the conversations that went through the network, learnt
or not, and no padding. Peak memory is what torch allocated on a GPU, and what was resident on a CPU, to the end (the
peer's: to the end of training). Both sides must find the same loss on the tokens of held-out answers before training,
and, within a bound for another order, after it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread itself over all that it sees

import numpy as np

from benchmarks.lm_sides import WARM_UP, compare, conclude, figures, peer, recipe, write_rows
from benchmarks.side_by_side import Figures, add_options, in_turns
from toolkit import samples
from toolkit.config import ChatConfig, ModelConfig
from toolkit.data import chat, conversations
from toolkit.models import load_tokenizer

HELD_OUT = 16
LENGTH, RANK = 1024, 16
RATES = {"LoRA": 5e-4, "all weights": 2e-5}
APART = {"held_out_before": 0.02, "held_out_loss": 0.15, "held_out_tokens": 0}
"""Largest differences between the sides."""


def main() -> None:
    """Measure in turns; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["trl-padded", "trl-packed"], default="trl-padded")
    parser.add_argument("--full", action="store_true", help="train all weights, no adapter")
    parser.add_argument("--rows", type=int, default=320, help="conversations of the epoch (default: 320)")
    parser.add_argument("--global-batch", type=int, default=16, help="conversations of a step (default: 16)")
    parser.add_argument("--micro-batch", type=int, help="of a forward pass, but in trl-packed (default: 4 at most)")
    add_options(parser, rounds=3)
    options = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is not installed: pip install -c constraints.txt -e '.[bench]'")
    micro_batch = options.micro_batch or math.gcd(options.global_batch, 4)
    if options.global_batch % micro_batch:
        parser.error(f"--global-batch {options.global_batch} is no multiple of --micro-batch {micro_batch}")
    trained = "all weights" if options.full else "LoRA"
    with tempfile.TemporaryDirectory(prefix="sft_vs_trl_") as name:
        folder = Path(name)
        write_conversations(folder, options.rows)
        lengths = tokens_of(folder)
        shared = {
            "steps": WARM_UP + math.ceil(len(lengths) / options.global_batch),
            "lr": RATES[trained],
            "rank": 0 if options.full else RANK,
        }
        peer_batch = micro_batch, options.global_batch // micro_batch  # of a forward pass, and passes of a step
        if options.peer == "trl-packed":
            peer_batch = 1, max(1, round(options.global_batch * sum(lengths) / len(lengths) / LENGTH))
        batch = {"train.global_batch": options.global_batch, "train.micro_batch": micro_batch}
        sides = {
            "ours": lambda number: ours(folder, number, batch, lengths, shared),
            "peer": lambda number: theirs(folder, number, options.peer, peer_batch, shared),
        }
        runs = in_turns(sides, options.rounds, "tokens_per_second")
    result = {"benchmark": "sft_vs_trl", "trained": trained, "against": options.peer, **compare(runs, APART)}
    result |= {
        "steps": shared["steps"],
        "rows": len(lengths),
        "mean_tokens": sum(lengths) / len(lengths),
        "global_batch": options.global_batch,
        "micro_batch": micro_batch,
        "peer_batch": peer_batch,
    }
    names = {"ours": "recipes/sft.py", "peer": options.peer}
    conclude(result, options, names, f"SmolLM2-135M, {trained}")


def write_conversations(folder: Path, count: int) -> None:
    """Short tasks with their answers, some of them held out."""
    with (samples.fetch("instructions") / "data.jsonl").open(encoding="utf-8") as file:
        lines = list(dict.fromkeys(file))
    np.random.default_rng(0).shuffle(lines)
    if not 0 < count <= len(lines) - HELD_OUT - 1:
        raise SystemExit(f"--rows {count}: choose 1 to {len(lines) - HELD_OUT - 1}")
    splits = {"test": lines[:HELD_OUT], "validation": lines[HELD_OUT : HELD_OUT + 1], "train": lines[-count:]}
    for name, part in splits.items():
        write_rows(folder / f"{name}.jsonl", [json.loads(line) for line in part])


def sources(folder: Path) -> dict[str, Path]:
    """The recipe's options for the conversations."""
    names = {"name": "train", "validation": "validation", "test": "test"}
    return {f"data.{key}": folder / f"{name}.jsonl" for key, name in names.items()}


def tokens_of(folder: Path) -> list[int]:
    """Of each conversation to learn, by its id in the recipe."""
    given: dict[str, Any] = {name.split(".")[1]: (str(file),) for name, file in sources(folder).items()}
    config = ChatConfig(**given, max_length=LENGTH)
    tokenizer = load_tokenizer(ModelConfig(name="sample:smollm2"), pads=False)
    return list(chat(config, conversations(config), tokenizer).train["length"])


def ours(folder: Path, number: int, batch: dict[str, int], lengths: list[int], shared: dict[str, Any]) -> Figures:
    """One run of the recipe."""
    target = folder / f"ours_{number}"
    options = {
        **sources(folder),
        "data.max_length": LENGTH,
        "model.name": samples.fetch("smollm2"),
        **batch,
        "optim.lr": shared["lr"],
        **({"adapter.rank": shared["rank"]} if shared["rank"] else {"adapter.name": "none"}),
    }
    lines, report = recipe("sft.py", target, shared["steps"], options)
    ledger = target / "samples" / "attempt_0001" / "rank_00000.jsonl"
    ids = [json.loads(line)["ids"] for line in ledger.read_text(encoding="utf-8").splitlines()]
    return figures(
        [line["step_seconds"] for line in lines],
        [sum(lengths[one] for one in step) for step in ids],
        [line["loss"] for line in lines],
        peak_bytes=report["peak_bytes"],
        held_out_before=report["before"]["loss"],
        held_out_loss=report["test"]["loss"],
        held_out_tokens=report["test"]["units"],
    )


def theirs(folder: Path, number: int, name: str, batch: tuple[int, int], shared: dict[str, Any]) -> Figures:
    """One run of a peer."""
    options = {
        "model": samples.fetch("smollm2"),
        "data": folder,
        "max-length": LENGTH,
        "output": folder / f"peer_{number}",
        "micro-batch": batch[0],
        "accumulate": batch[1],
        **shared,
    }
    found = peer("sft_peers.py", name, options)
    after, before = found.pop("after"), found.pop("before")
    return figures(**found, held_out_before=before["loss"], held_out_loss=after["loss"], held_out_tokens=after["units"])


if __name__ == "__main__":
    main()
