"""The recipe with traps: a place where a rank is killed, signalled or broken, and samples that spoil a loss.

It is `recipes/bert_cls.py` step by step, around another task. The signals are real, and the rank sends them to itself,
so that they always come in the same moment.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from recipes.bert_cls import Config
from toolkit.data import text_classification
from toolkit.data.loader import Columns, Step
from toolkit.data.summary import majority, plan_rows, report_facts
from toolkit.models import input_limits, load_classifier, load_tokenizer, width
from toolkit.session import Session
from toolkit.tasks import Batch, Classification

BREAK = 0
"""In the place of a signal: an exception."""


@dataclass(frozen=True)
class Trap:
    """Where a rank gets a signal, and which.

    Attributes:
        place: `setup` (the folder is there, the run is not yet described), `base` (while that is done), `baseline`,
            `validation` or `test` (in its batch `number` of this process), `step` (in the last micro-batch of step
            `number`), `logged` (right after it), `data` (where sample `number` is collated), `model` (while the
            model is saved), `finished` (before the run enters that among its attempts), `never`.
        number: of the step, batch or sample.
        rank: the one that is hit; all by default.
        signal: its number, or `BREAK`.
    """

    place: str = "never"
    number: int = 1
    rank: int | None = None
    signal: int = signal.SIGKILL

    def pass_by(self, place: str, number: int, rank: int) -> None:
        """Spring, if this is the place."""
        if (place, number) != (self.place, self.number) or self.rank not in (None, rank):
            return
        if self.signal == BREAK:
            raise RuntimeError(f"broken in {place} {number}")
        os.kill(os.getpid(), self.signal)
        time.sleep(0.3)  # it is noted by a thread, which must not come too late for what is left of a small run


@dataclass(frozen=True)
class Naps(Trap):
    """No signal, but sleep.

    Attributes:
        naps: by place, number and rank: for how many seconds. The number 0 stands for all that are not named.
    """

    naps: Mapping[tuple[str, int, int], float] = field(default_factory=dict)

    def pass_by(self, place: str, number: int, rank: int) -> None:
        time.sleep(self.naps.get((place, number, rank), self.naps.get((place, 0, rank), 0.0)))


@dataclass(frozen=True)
class Poison:
    """What spoils losses and samples, and what is left out by decree.

    Attributes:
        factors: by id of a sample: what the loss of its micro-batch is multiplied by.
        from_step: the first at which they are.
        left_out: steps that are not taken from the start, as if a fault had been there.
        unfit: ids of samples whose tokens are damaged.
    """

    factors: Mapping[int, float] = field(default_factory=dict)
    from_step: int = 1
    left_out: Mapping[int, str] = field(default_factory=dict)
    unfit: tuple[int, ...] = ()

    def spoil(self, row: dict[str, Any]) -> dict[str, Any]:
        """The sample, perhaps with a token that no model knows."""
        return row | {"input_ids": [10**6] if row["id"] in self.unfit else row["input_ids"]}


class Trapped(Classification):
    """The recipe's task with a trap in its calls."""

    trap: Trap
    poison: Poison
    rank: int
    place = "baseline"
    step: Step | None = None
    micro_batches = 0
    batches = 0

    def enter(self, place: str) -> None:
        """What the next batches of an evaluation belong to."""
        self.place, self.batches = place, 0

    def begin(self, step: Step) -> None:
        """The next losses are those of this step."""
        self.step, self.micro_batches = step, 0

    def collate(self, rows: Columns, empty: bool) -> Batch:
        for sample in rows["id"]:
            self.trap.pass_by("data", sample, self.rank)
        return super().collate(rows, empty)

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        loss = super().loss(outputs, batch)
        if self.step is None:  # a look at the gradients before the first one
            return loss
        self.micro_batches += 1
        if self.micro_batches == len(self.step.micro_batches):
            self.trap.pass_by("step", self.step.number, self.rank)
        if self.step.number >= self.poison.from_step:
            loss = loss * math.prod(self.poison.factors.get(sample, 1.0) for sample in batch.ids)
        return loss

    def measure(self, outputs: Any, batch: Batch) -> dict[str, torch.Tensor]:
        self.batches += 1
        self.trap.pass_by(self.place, self.batches, self.rank)
        return super().measure(outputs, batch)


class TrappedTokenizer:
    """Saved with the run's description at first, and then beside the model, when its weights are there already."""

    def __init__(self, tokenizer: Any, trap: Trap) -> None:
        self.tokenizer, self.trap = tokenizer, trap
        self.places = iter(("base", "model"))

    def save_pretrained(self, target: Path) -> None:
        self.trap.pass_by(next(self.places), 1, 0)
        self.tokenizer.save_pretrained(target)


class TrappedPlan(dict[str, Any]):
    """The recipe's part of the plan, which is asked for when the run has its folder, and before it is described."""

    def __init__(self, trap: Trap, rank: int, **sections: Any) -> None:
        super().__init__(sections)
        self.trap, self.rank = trap, rank

    def items(self) -> Any:
        self.trap.pass_by("setup", 1, self.rank)
        return super().items()


def main(config: Config, trap: Trap = Trap(), poison: Poison = Poison()) -> None:
    """The whole run."""
    with Session("bert_cls", config) as session:
        tokenizer = load_tokenizer(config.model)
        data = text_classification(config.data, tokenizer)
        model = load_classifier(config.model, data.labels, seed=config.run.seed)
        limits = input_limits(model, config.data.max_length)
        task = Trapped(data.labels, tokenizer, config.train.label_smoothing, **limits)
        task.trap, task.poison, task.rank = trap, poison, session.world.rank

        training = data.train.map(poison.spoil) if poison.unfit else data.train
        workers, cap = config.data.workers, config.data.max_bad_rows
        options = {"workers": workers, "max_bad_rows": cap, "width": width(model)}
        train, validation, test = session.loaders(task, training, data.validation, data.test, **options)
        sections = {"model": {"name": config.model.name}, "data": plan_rows(data, config.data.max_length)}
        plan = TrappedPlan(trap, session.world.rank, **sections)
        saved = TrappedTokenizer(tokenizer, trap)
        session.setup(model, tokenizer=saved, data_fingerprint=data.fingerprint, plan=plan)
        session.describe(labels=data.labels, data=report_facts(data, config.data.max_length))
        session._progress.left_out |= poison.left_out

        before = session.baseline(test, "test before training")
        task.enter("validation")
        for step in session.steps(train, validation):
            task.begin(step)
            session.log(step, session.train_step(step))
            trap.pass_by("logged", step.number, session.world.rank)
        task.enter("test")
        after = session.evaluate(test, "test")
        session.finish(before=before, test=after, majority=majority(data))
        trap.pass_by("finished", 1, session.world.rank)
