"""One rank of `benchmarks/scaling.py`: trains under one strategy after the other, and says what it took.

Rank 0 speaks with the benchmark by lines of JSON on its standard output; where it asks for a link, it waits for a line
on its standard input.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.scaling_net import INTERFACE
from toolkit.config import ModelConfig, OptimConfig, StrategyConfig, TextDataConfig
from toolkit.data import text_classification
from toolkit.data.loader import Loader, batch_shape
from toolkit.engine import train_step
from toolkit.models import load_tokenizer, repeated_blocks
from toolkit.optim import adamw
from toolkit.precision import Precision
from toolkit.strategies import Strategy, choose_strategy
from toolkit.tasks import Classification
from toolkit.world import World, world

LR = 5e-4
TAIL = 10
"""Last steps whose mean loss is compared."""
PATIENCE = 300
"""Seconds between two measurements after which a rank ends itself; nobody is left behind."""
SMALLEST = {"ddp": 2.0, "diloco": 2.0, "zero1": 2.0, "zero2": 2.0, "zero3": 3.0}
"""How often the bytes of the model are sent, times (n-1)/n."""


class Job:
    """What is alike for all strategies.

    Args:
        plan: `sizes` of the network, `length` of the texts, `batch`, `steps`, `timed` steps, `links` and `strategies`.
        lines: to the benchmark.
    """

    def __init__(self, plan: dict[str, Any], lines: TextIO) -> None:
        self.plan = plan
        self.lines = lines
        self.world = world()
        self.world.connect()
        self.tokenizer = load_tokenizer(ModelConfig())
        self.data = text_classification(TextDataConfig(max_length=plan["length"]), self.tokenizer)
        self.task = Classification(self.data.labels, self.tokenizer)

    def run(self) -> None:
        """The computing alone, then each strategy."""
        alone = dataclasses.replace(self.world, rank=0, size=1)
        compute = self.measure({"name": "single"}, alone, self.plan["batch"] // self.world.size, links={})
        self.say({"strategy": "single", **compute, "minimum": 0.0})
        for title, options in self.plan["strategies"].items():
            found = self.measure(options, self.world, self.plan["batch"], self.plan["links"])
            self.say({"strategy": title, **found, "minimum": smallest(options, self.model(), self.world.size)})
        self.world.close()

    def model(self) -> BertForSequenceClassification:
        """A small BERT, alike on all ranks."""
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(self.tokenizer),
            **self.plan["sizes"],
            num_labels=len(self.data.labels),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return BertForSequenceClassification(config)

    def measure(self, options: dict[str, Any], w: World, batch: int, links: dict[str, int | None]) -> dict[str, Any]:
        """Loss after the steps; bytes and seconds of the last of them, and seconds of further ones on each link."""
        # Where ranks meet after so many steps, a step takes and sends what it does in the mean over those.
        period = options.get("local_steps")
        timed, steps = period or self.plan["timed"], self.plan["steps"]
        typical = statistics.fmean if period else statistics.median
        self.ask(None)
        shape = batch_shape(batch, None, w.size)
        strategy = choose_strategy(
            StrategyConfig(**options), world=w, precision=Precision("fp32"), shape=shape, max_grad_norm=1.0
        )
        strategy.setup(self.model(), lambda wrapped: adamw(wrapped, OptimConfig(lr=LR)))
        loader = Loader(self.data.train, self.task.collate, shape, rank=w.rank, seed=1)
        taken = self.taken(strategy, loader, steps + len(links) * (timed + 1))
        losses = [next(taken)[0] for _ in range(steps - timed)]
        before = self.sent()
        last = [next(taken) for _ in range(timed)]
        sent = (self.sent() - before) / timed
        losses += [loss for loss, _ in last]
        seconds = {"unlimited": typical(took for _, took in last)}
        for name, rate in links.items():
            self.ask(rate)
            next(taken)
            seconds[name] = typical(next(taken)[1] for _ in range(timed))
        taken.close()
        strategy.teardown()
        reports = self.world.gather((sent, seconds))
        return {
            "ranks": self.world.size,
            "bytes": statistics.fmean(of_rank for of_rank, _ in reports),
            "seconds": {name: max(took[name] for _, took in reports) for name in seconds},
            "loss": statistics.fmean(losses[-TAIL:]),
            "parameters": sum(parameter.numel() for parameter in self.model().parameters()),
        }

    def taken(self, strategy: Strategy, loader: Loader, steps: int) -> Iterator[tuple[float, float]]:
        """Loss and seconds of each step."""
        for step in loader.steps(steps):
            began = time.perf_counter()
            loss = train_step(strategy, self.task, step, learning_rate=LR, seed=0).loss
            assert math.isfinite(loss), loss
            yield loss, time.perf_counter() - began

    def sent(self) -> int:
        """Bytes that the interface has sent, once all ranks are here."""
        self.meet()
        if self.world.size == 1:
            return 0
        return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())

    def ask(self, rate: int | None) -> None:
        """Have the links held to `rate`."""
        self.meet()
        self.say({"link": rate})
        if self.world.main and not sys.stdin.readline():
            raise SystemExit("the benchmark is gone")
        self.meet()

    def say(self, what: dict[str, Any]) -> None:
        """Tell the benchmark."""
        signal.alarm(PATIENCE)
        if self.world.main:
            print(json.dumps(what), file=self.lines, flush=True)

    def meet(self) -> None:
        """Wait for the others."""
        if self.world.connected:
            dist.barrier()


def smallest(options: dict[str, Any], model: BertForSequenceClassification, ranks: int) -> float:
    """Bytes that a rank must send in a step at least: see the benchmark's own text for the formulas."""
    sizes = {name: 4 * parameter.numel() for name, parameter in model.named_parameters()}
    whole = sum(sizes.values())
    if options["name"] == "fsdp":
        blocks = sum(4 * parameter.numel() for block in repeated_blocks(model) for parameter in block.parameters())
        group = options.get("shard_size", ranks)
        copies = ranks // group
        # The root's parameters stay gathered between forward and backward.
        sharded = (group - 1) / group * (3 * blocks + 2 * (whole - blocks))
        return sharded + 2 * (copies - 1) / copies * whole / group
    if options.get("compress") == "powersgd":
        whole = sum(4 * _sent_by_powersgd(parameter) for parameter in model.parameters())
    elif options.get("compress") == "bf16":
        whole = whole // 2
    elif options["name"] == "diloco":
        whole = 3 * whole // options["local_steps"]  # weights and two moments, once in a while
    return SMALLEST[options["name"]] * (ranks - 1) / ranks * whole


def _sent_by_powersgd(parameter: torch.Tensor, rank: int = 4) -> int:
    """Elements: two narrow matrices where they are less than half of the whole."""
    narrow = rank * sum(parameter.shape) if parameter.dim() == 2 else parameter.numel()
    return narrow if 2 * narrow < parameter.numel() else parameter.numel()


if __name__ == "__main__":
    # What libraries print must not get between the lines.
    own_lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    signal.alarm(PATIENCE)
    Job(json.loads(sys.argv[1]), own_lines).run()
