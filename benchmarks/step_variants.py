"""One optimizer step of this toolkit in each of the ways to launch it: plain, compiled, as CUDA graphs, both.

    python benchmarks/step_variants.py                                  # a small encoder
    python benchmarks/step_variants.py --network bert-base              # on a GPU
    python benchmarks/step_variants.py --network llama_1b --batch 4     # on a GPU

`bert-base` classifies texts of lognormal lengths (mean 61, at most 256 tokens), with dropout; `llama_1b` predicts the
next token of full sequences, one text each; `small` is an encoder of 2 blocks of width 128. Weights and tokens are
random, precision is bf16, and steps are whole: forward, backward, clipping, AdamW, and the wait for loss and norm. All
ways see the same batches. The figure is the median of the seconds of a step, after `--warm-up` steps in which shapes
are compiled and recorded; the table has the time that those took beyond that.

MFU is 6 N tokens a second over the machine's matrix peak, measured in the same run, where N is the number of weights
that multiply; attention adds 12 × layers × width × length, halved where it is causal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.device import device, matrix_peak, synchronize
from benchmarks.lines import write_line
from benchmarks.side_by_side import machine
from toolkit.compute import compile_blocks, fuse_loss, remove_padding, replace_dropout
from toolkit.config import OptimConfig, StrategyConfig
from toolkit.data.loader import Step, batch_shape
from toolkit.engine import train_step
from toolkit.graphs import Graphs
from toolkit.memory import peak_bytes
from toolkit.optim import adamw
from toolkit.precision import Precision
from toolkit.strategies import choose_strategy
from toolkit.tasks import Classification, LanguageModeling, Task
from toolkit.world import world

LONGEST = 256
WAYS = {"plain": (False, False), "compiled": (True, False), "graphs": (False, True), "compiled, graphs": (True, True)}
"""Whether blocks are compiled, and whether micro-batches are recorded."""
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
LLAMA: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "vocab_size": 32_000,
}


@dataclass(frozen=True)
class Job:
    """What a step is of: the model, its task, the batches, and operations by token."""

    model: Any
    task: Task
    steps: list[Step]
    flops: float


def main() -> None:
    """Measure each way; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["small", "bert-base", "llama_1b"], default="small")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), help="default: all that this machine has")
    parser.add_argument("--batch", type=int, help="texts or sequences of a step (default: 32; llama_1b: 2)")
    parser.add_argument("--steps", type=int, default=40, help="that are timed (default: 40)")
    parser.add_argument("--warm-up", type=int, default=60, help="steps before them (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result to this file as a line of JSON")
    options = parser.parse_args()
    recordable = device().type == "cuda" and options.network != "llama_1b"
    ways = options.ways or [way for way, (_, recorded) in WAYS.items() if recordable or not recorded]
    if any(WAYS[way][1] for way in ways) and not recordable:
        parser.error("graphs need a GPU, and a classifier")
    found = {way: measure(options, *WAYS[way]) for way in ways}
    peak = matrix_peak()
    for figures in found.values():
        figures["mfu"] = figures["flops_per_second"] / peak
    show(found)
    result = {"benchmark": "step_variants", "network": options.network, "ways": found, **machine()}
    write_line(result | {"bf16_peak_gflops": round(peak / 1e9)}, options.json)


def measure(options: argparse.Namespace, compiled: bool, recorded: bool) -> dict[str, float]:
    """Seconds and memory of a step of a new model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    job = build(options)
    here = world()
    here.connect()
    if here.device.type == "cpu":
        replace_dropout(job.model)
    if compiled:
        compile_blocks(job.model, here.device)
    shape = batch_shape(job.steps[0].samples, job.steps[0].samples, 1)
    layout: dict[str, Any] = {"world": here, "precision": Precision("bf16"), "shape": shape, "max_grad_norm": 1.0}
    strategy: Any = choose_strategy(StrategyConfig(name="single"), **layout)
    strategy.setup(job.model, lambda model: adamw(model, OptimConfig()))
    graphs = Graphs(strategy, job.task) if recorded else None
    if here.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for step in job.steps:
        began = time.perf_counter()
        train_step(strategy, job.task, step, learning_rate=1e-5, seed=0, graphs=graphs)
        synchronize()
        times.append(time.perf_counter() - began)
    timed = times[options.warm_up :]
    seconds = statistics.median(timed)
    tokens = statistics.mean(
        int(step.micro_batches[0].inputs["attention_mask"].sum()) for step in job.steps[options.warm_up :]
    )
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "flops_per_second": job.flops * tokens / seconds,
        "peak_bytes": peak_bytes(here.device),
        "warm_up_seconds": sum(times[: options.warm_up]) - options.warm_up * seconds,
        "shapes": graphs.shapes if graphs is not None else 0,
    }


def build(options: argparse.Namespace) -> Job:
    """The model, without padding, and its batches."""
    rng, total = np.random.default_rng(0), options.warm_up + options.steps
    size = options.batch or (2 if options.network == "llama_1b" else 32)
    columns: list[dict[str, Any]] = []
    model: Any
    task: Task
    if options.network == "llama_1b":
        config = LlamaConfig(**LLAMA)
        model, length = LlamaForCausalLM(config), config.max_position_embeddings
        assert fuse_loss(model) == ""
        task = LanguageModeling(tokenizer(), vocabulary=config.vocab_size, fused=True)
        attention = 6 * config.num_hidden_layers * config.hidden_size * length
        lengths = [[length] * size] * total
        columns = [{"pieces": [[length]] * size, "bytes": [length] * size} for _ in range(total)]
    else:
        config = BertConfig(num_labels=5, **(SMALL if options.network == "small" else {}))
        model, attention = BertForSequenceClassification(config), 0
        task = Classification(list("abcde"), tokenizer(), vocabulary=config.vocab_size, positions=LONGEST)
        lengths = [np.clip(rng.lognormal(3.9, 0.7, size).astype(int), 8, LONGEST).tolist() for _ in range(total)]
        columns = [{"label": rng.integers(0, 5, size).tolist()} for _ in range(total)]
    model.train()
    assert remove_padding(model) == ""
    tables = sum(p.numel() for name, p in model.named_parameters() if "embed" in name)
    multiplying = model.num_parameters() - (0 if options.network == "llama_1b" else tables)
    steps = []
    for number, (of_texts, more) in enumerate(zip(lengths, columns, strict=True), start=1):
        ids = [rng.integers(2, config.vocab_size, length).tolist() for length in of_texts]
        batch = task.collate({"input_ids": ids, "id": list(range(size)), **more}, empty=False)
        steps.append(Step(number, 0, [batch.pin_memory() if device().type == "cuda" else batch], size, number * size))
    return Job(model, task, steps, float(6 * multiplying + attention))


def tokenizer() -> PreTrainedTokenizerFast:
    """One that has a padding token: nothing is cut into tokens here."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0}, "[PAD]")), pad_token="[PAD]")


def show(found: Mapping[str, Mapping[str, float]]) -> None:
    """The table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "ms a step", "tokens/s", "MFU", "GiB", "warm-up, s", "shapes"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for way, figures in found.items():
        table.add_row(
            way,
            f"{1e3 * figures['seconds']:.1f}",
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['mfu']:.1%}",
            f"{figures['peak_bytes'] / 2**30:.2f}",
            f"{figures['warm_up_seconds']:.1f}",
            f"{figures['shapes']:.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    main()
