"""Pre-training a language model: this toolkit's recipe against the Trainer of transformers as in its run_clm example.

    python benchmarks/pretrain_lm_vs_trainer.py
    python benchmarks/pretrain_lm_vs_trainer.py --peer trainer-compiled
    python benchmarks/pretrain_lm_vs_trainer.py --network llama_1b --steps 30        # on a GPU
    python benchmarks/pretrain_lm_vs_trainer.py --network llama_1b --steps 30 --peer trainer-compiled --compile

Both train a new network of the same configuration on the same news articles with the same tokenizer, in bf16 (weights
in fp32) with fused AdamW, clipped gradients, the same learning rates, and steps of as many sequences of one length,
each in a process of its own, in turns. The recipe packs whole texts into sequences, and none sees another; the peer
cuts all texts, joined, into blocks, in which tokens see the texts before theirs. With `--texts joined` articles are
joined to texts longer than a sequence before either side gets them, so that attention is as long on both. The peer is
the Trainer at its best, or that with `torch_compile`; `--compile` compiles the recipe's network too.

The figure is tokens a second after a few steps to warm up: tokens that were predicted, no filler. Peak memory is what
torch allocated on a GPU, and what was resident on a CPU, to the end (the peer's: to the end of training). Both must
reach the same loss over the last quarter of the steps, and the same loss of the same held-out articles, within bounds
for texts that come in another order and, in blocks, for what else a token sees.

MFU is tokens a second × (6 N + 12 × layers × width × length) over the machine's matrix peak, measured in the same run.
N is the number of weights that multiply: all but the table of the input embedding, which does so only where it is the
output layer too. The second term is attention over the whole sequence: the usual convention, for both sides alike; it
counts what a causal mask and, in the recipe, the borders of texts leave out. `mfu_causal` counts half of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread itself over all that it sees

import torch
import yaml

from benchmarks.device import matrix_peak
from benchmarks.lm_sides import ROOT, check_steps, compare, conclude, figures, peer, recipe, write_rows
from benchmarks.side_by_side import Figures, add_options, in_turns
from toolkit import samples
from toolkit.config import CorpusConfig, DecoderConfig
from toolkit.data import text_corpus
from toolkit.data.bpe import trained_tokenizer
from toolkit.decoders import load_decoder

HELD_OUT = 16
JOINED = 64
"""Articles to a text, where they are joined: some 30,000 tokens."""
SHORT = 1200
"""Characters of a held-out article, at most: none is cut, so that both sides predict the same tokens."""
DECAY, FINAL_SHARE = 0.1, 0.1
APART = {"loss": 0.3, "held_out_loss": 0.3, "held_out_tokens": 0, "parameters": 0}
"""Largest differences between the sides."""


@dataclass(frozen=True)
class Network:
    """What is trained, and in what steps: options of the recipe."""

    sizes: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 8192
    length: int = 512
    batch: int = 16
    micro_batch: int = 16
    lr: float = 2e-3


def networks() -> dict[str, Network]:
    """By name: the recipe's default one, and that of configs/pretrain_lm/llama_1b.yaml with fewer tokens."""
    settings = yaml.safe_load((ROOT / "configs" / "pretrain_lm" / "llama_1b.yaml").read_text(encoding="utf-8"))
    large = Network(settings["model"], 32_000, settings["data"]["max_length"], 8, 2, settings["optim"]["lr"])
    return {"llama_7m": Network(), "llama_1b": large}


def main() -> None:
    """Measure in turns; print a table and one line of JSON."""
    known = networks()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(known), default="llama_7m", help="default: llama_7m")
    parser.add_argument("--peer", choices=["trainer-best", "trainer-compiled"], default="trainer-best")
    parser.add_argument("--texts", choices=["articles", "joined"], default="articles", help="default: articles")
    parser.add_argument("--compile", action="store_true", help="let the recipe compile its network")
    parser.add_argument("--steps", type=int, default=40, help="of the optimizer (default: 40)")
    parser.add_argument("--vocabulary", type=int, help="tokens that are known (default: 8192; llama_1b: 32000)")
    parser.add_argument("--global-batch", type=int, help="sequences of a step (default: 16; llama_1b: 8)")
    parser.add_argument("--micro-batch", type=int, help="sequences of a forward pass (default: 16; llama_1b: 2)")
    add_options(parser, rounds=3)
    options = parser.parse_args()
    check_steps(parser, options.steps)
    network = known[options.network]
    batch = options.global_batch or network.batch
    micro_batch = options.micro_batch or min(network.micro_batch, batch)
    if batch % micro_batch:
        parser.error(f"--global-batch {batch} is no multiple of --micro-batch {micro_batch}")
    with tempfile.TemporaryDirectory(prefix="pretrain_lm_vs_trainer_") as name:
        folder = Path(name)
        write_texts(folder, 1 if options.texts == "articles" else JOINED)
        flops, attention = write_network(folder, network, options.vocabulary or network.vocabulary)
        sizes = {"train.global_batch": batch, "train.micro_batch": micro_batch, "train.compile": options.compile}
        sides = {
            "ours": lambda number: ours(folder, number, network, options.steps, sizes),
            "peer": lambda number: theirs(folder, number, network, options.steps, options.peer, sizes),
        }
        runs = in_turns(sides, options.rounds, "tokens_per_second")
    peak = matrix_peak()
    result = {"benchmark": "pretrain_lm_vs_trainer", "network": options.network, "against": options.peer}
    result |= compare(runs, APART)
    result |= {
        "texts": options.texts,
        "mfu": {side: round(flops * result[side] / peak, 3) for side in runs},
        "mfu_causal": {side: round((flops - attention / 2) * result[side] / peak, 3) for side in runs},
        "gflops_per_token": flops / 1e9,
        "bf16_peak_gflops": round(peak / 1e9),
        "steps": options.steps,
        "length": network.length,
        "global_batch": batch,
        "micro_batch": micro_batch,
        "compiled": options.compile,
    }
    print(f"mfu, half of attention: {result['mfu_causal']['ours']} against {result['mfu_causal']['peer']}")
    names = {"ours": "recipes/pretrain_lm.py" + ", compiled" * options.compile, "peer": options.peer}
    conclude(result, options, names, f"{options.network}, {batch} × {network.length} tokens")


def write_texts(folder: Path, at_once: int) -> None:
    """News articles: a few short ones for validation and test, the others to learn, so many to a text."""
    with (samples.fetch("bbc-news") / "data.jsonl").open(encoding="utf-8") as file:
        texts = list(dict.fromkeys(json.loads(line)["text"] for line in file))
    short = [text for text in texts if len(text) < SHORT][: 2 * HELD_OUT]
    splits = {
        "train": ["\n\n".join(part) for part in batched((text for text in texts if text not in short), at_once)],
        "validation": short[::2],
        "test": short[1::2],
    }
    for name, part in splits.items():
        write_rows(folder / f"{name}.jsonl", [{"text": text} for text in part])


def sources(folder: Path) -> dict[str, Path]:
    """The recipe's options for the articles."""
    names = {"name": "train", "validation": "validation", "test": "test"}
    return {f"data.{key}": folder / f"{name}.jsonl" for key, name in names.items()}


def batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """So many at a time."""
    texts = iter(texts)
    while part := list(itertools.islice(texts, size)):
        yield part


def write_network(folder: Path, network: Network, vocabulary: int) -> tuple[float, float]:
    """Train the tokenizer, and write it with the network's configuration.

    Returns:
        Operations of a token, forward and back, and those of them that are attention.
    """
    corpus = text_corpus(CorpusConfig(**{name.split(".")[1]: (str(file),) for name, file in sources(folder).items()}))
    tokenizer = trained_tokenizer(corpus, vocabulary, 100_000_000)
    with torch.device("meta"):
        model: Any = load_decoder(DecoderConfig(**network.sizes), tokenizer, network.length, seed=0)
    config = model.config
    for part in (tokenizer, config):
        part.save_pretrained(folder / "network")
    table = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    attention = 12 * config.num_hidden_layers * config.hidden_size * network.length
    return float(6 * (model.num_parameters() - table) + attention), float(attention)


def ours(folder: Path, number: int, network: Network, steps: int, sizes: dict[str, Any]) -> Figures:
    """One run of the recipe."""
    options = {
        **sources(folder),
        "data.max_length": network.length,
        "tokenizer.name": folder / "network",
        **{f"model.{name}": value for name, value in network.sizes.items()},
        **sizes,
        "optim.lr": network.lr,
        "optim.weight_decay": DECAY,
        "optim.final_share": FINAL_SHARE,
    }
    lines, report = recipe("pretrain_lm.py", folder / f"ours_{number}", steps, options)
    return figures(
        [line["step_seconds"] for line in lines],
        [line["units"] for line in lines],
        [line["loss"] for line in lines],
        peak_bytes=report["peak_bytes"],
        held_out_loss=report["test"]["loss"],
        held_out_tokens=report["test"]["units"],
        parameters=int(report["plan"]["model"]["parameters"].split()[0].replace(",", "")),
    )


def theirs(folder: Path, number: int, network: Network, steps: int, name: str, sizes: dict[str, Any]) -> Figures:
    """One run of a peer."""
    options = {
        "network": folder / "network",
        "data": folder,
        "length": network.length,
        "weight-decay": DECAY,
        "final-share": FINAL_SHARE,
        "output": folder / f"peer_{number}",
        "steps": steps,
        "micro-batch": sizes["train.micro_batch"],
        "accumulate": sizes["train.global_batch"] // sizes["train.micro_batch"],
        "lr": network.lr,
    }
    found = peer("pretrain_lm_peers.py", name, options)
    after = found.pop("after")
    return figures(**found, held_out_loss=after["loss"], held_out_tokens=after["units"])


if __name__ == "__main__":
    main()
