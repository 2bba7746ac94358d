"""The order of the samples and their way to the ranks.

The order is a pure function of (seed, epoch); the samples of a step are taken from it globally and then dealt to
the ranks. So nothing depends on the number of ranks, and the state of the data is one integer: samples consumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from toolkit.errors import ConfigError, DataError
from toolkit.order import epoch_order as epoch_order
from toolkit.signals import as_helper

Columns = Mapping[str, Sequence[Any]]
Collate = Callable[[Columns, bool], Any]
Problem = Callable[[Mapping[str, Any]], str]
"""Why a row is unfit, or an empty string."""
Forward = tuple[list[int], bool]
"""Rows of one micro-batch of one rank, and whether they are filler."""


@dataclass
class Step:
    """What one rank does in one optimizer step.

    Attributes:
        number: of the optimizer step; the first is 1.
        epoch: 0-based.
        micro_batches: of this rank; every rank has as many.
        samples: of all ranks, unfit ones among them.
        samples_seen: of all ranks in all steps up to and with this one.
    """

    number: int
    epoch: int
    micro_batches: list[Any]
    samples: int
    samples_seen: int

    @property
    def skipped(self) -> list[tuple[int, str]]:
        """Id and fault of each row that was dealt to this rank and left out as unfit."""
        return [row for batch in self.micro_batches for row in batch.skipped]


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut: `global_batch` = `micro_batch` × `accumulation` × `ranks`."""

    global_batch: int
    micro_batch: int
    accumulation: int
    ranks: int


def batch_shape(global_batch: int, micro_batch: int | None, ranks: int, *, largest: int = 32) -> BatchShape:
    """Derive the accumulation, and the micro-batch where None is given: the largest divisor up to `largest`.

    Raises:
        ConfigError: the global batch cannot be divided.
    """
    if global_batch % ranks:
        below, above = global_batch // ranks * ranks, math.ceil(global_batch / ranks) * ranks
        raise ConfigError(
            f"--train.global_batch {global_batch} cannot be divided over {ranks} ranks",
            f"Use {f'{below} or ' if below else ''}{above}, or another number of processes.",
        )
    share = global_batch // ranks
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    if micro_batch is None:
        micro_batch = max(size for size in divisors if size <= largest)
    if share % micro_batch:
        raise ConfigError(
            f"--train.global_batch {global_batch} over {ranks} ranks is {share} samples a rank, which "
            f"--train.micro_batch {micro_batch} does not divide",
            f"Use a micro-batch of {', '.join(map(str, divisors))}, or leave it out.",
        )
    return BatchShape(global_batch, micro_batch, share // micro_batch, ranks)


def deal(rows: Sequence[int], shape: BatchShape, rank: int) -> list[Forward]:
    """The micro-batches of `rank` for the rows of one step.

    Rows are dealt one by one, as cards are, so that a ragged step is spread evenly. Every rank gets equally many
    micro-batches; one without rows gets a filler, because a sharded model computes together or not at all.
    """
    mine = list(rows[rank :: shape.ranks])
    forwards = math.ceil(math.ceil(len(rows) / shape.ranks) / shape.micro_batch)
    chunks = [mine[i * shape.micro_batch : (i + 1) * shape.micro_batch] for i in range(forwards)]
    return [(chunk, False) if chunk else ([rows[0]], True) for chunk in chunks]


class Loader:
    """Batches of an Arrow data set for one rank.

    Args:
        dataset: rows by index, one at least; `dataset[[3, 5]]` gives columns.
        collate: columns, and whether they are filler, to a batch (a task's method).
        shape: of the batches, over how many ranks.
        rank: this one.
        seed: of the order.
        workers: processes that collate; 0 collates in this one.
        pin_memory: for copies to a GPU.
        problem: says of a row why it is unfit, or nothing (a task's method). Unfit rows are left out of their
            micro-batch, which carries their ids and faults as `skipped`; all else stays as it was planned.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Collate,
        shape: BatchShape,
        *,
        rank: int = 0,
        seed: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
        problem: Problem | None = None,
    ) -> None:
        assert len(dataset) > 0, "without rows there is no next step to wait for"
        self.dataset = dataset
        self.shape = shape
        self.rank = rank
        self.seed = seed
        self._rows = _Rows(dataset, collate, problem)
        self._workers = workers
        self._pin_memory = pin_memory

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; the last may be smaller than the others."""
        return math.ceil(len(self.dataset) / self.shape.global_batch)

    def steps(self, total_steps: int, from_step: int = 0) -> Iterator[Step]:
        """The steps after `from_step` up to `total_steps`.

        Raises:
            DataError: no row is fit.
        """

        def plans() -> Iterator[tuple[Step, list[Forward]]]:
            return islice(self._plans(), from_step, total_steps)

        batches = self._stream(lambda: (forward for _, forwards in plans() for forward in forwards))
        for step, forwards in plans():
            step.micro_batches = list(islice(batches, len(forwards)))
            yield step

    def once(self) -> Iterator[Any]:
        """The micro-batches of this rank in one pass over all samples, each of which one rank has exactly once.

        Samples of like length stand together, so that little is padded.

        Raises:
            DataError: no row is fit.
        """
        lengths = np.asarray(self.dataset["length"], dtype=np.float64)  # one that is missing is NaN, and comes last
        rows = np.argsort(-lengths, kind="stable").tolist()
        per_step = self.shape.micro_batch * self.shape.ranks
        chunks = [rows[start : start + per_step] for start in range(0, len(rows), per_step)]
        return self._stream(lambda: (forward for chunk in chunks for forward in deal(chunk, self.shape, self.rank)))

    @property
    def forwards_of_one_pass(self) -> int:
        """Number of micro-batches that `once` gives."""
        return math.ceil(len(self.dataset) / (self.shape.micro_batch * self.shape.ranks))

    def _plans(self) -> Iterator[tuple[Step, list[Forward]]]:
        epoch, number, seen = 0, 0, 0
        while True:
            order = epoch_order(self.seed, epoch, len(self.dataset)).tolist()
            for start in range(0, len(order), self.shape.global_batch):
                rows = order[start : start + self.shape.global_batch]
                number, seen = number + 1, seen + len(rows)
                yield Step(number, epoch, [], len(rows), seen), deal(rows, self.shape, self.rank)
            epoch += 1

    def _stream(self, forwards: Callable[[], Iterator[Forward]]) -> Iterator[Any]:
        self._rows.find_filler()  # here, for its error would leave a worker wrapped in a traceback
        loader: DataLoader[Any] = DataLoader(
            self._rows,
            sampler=_Forwards(forwards),
            batch_size=None,
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            worker_init_fn=as_helper,  # launchers signal whole process groups, and the step is to be finished
        )
        return iter(loader)


class _Forwards(Sampler[Any]):
    """Micro-batches in the place of single rows: torch's DataLoader then collates whole ones in its workers."""

    def __init__(self, forwards: Callable[[], Iterator[Forward]]) -> None:
        self.forwards = forwards

    def __iter__(self) -> Iterator[Any]:
        return self.forwards()


class _Rows(Dataset[Any]):
    """A data set whose index is a micro-batch."""

    def __init__(self, dataset: Any, collate: Collate, problem: Problem | None) -> None:
        self.dataset = dataset
        self.collate = collate
        self.problem = problem
        self.filler: int | None = None

    def __getitem__(self, forward: Any) -> Any:
        rows, empty = forward
        columns = self.dataset[rows]
        faults = self._faults(columns)
        if not any(faults):
            return self.collate(columns, empty)
        # The row of a filler is reported where it was dealt.
        skipped = [] if empty else [(id_, fault) for id_, fault in zip(columns["id"], faults, strict=True) if fault]
        fit = [row for row, fault in zip(rows, faults, strict=True) if not fault]
        batch = self.collate(self.dataset[fit or [self.filler]], empty or not fit)
        batch.skipped = skipped
        return batch

    def find_filler(self) -> None:
        """Find the first row that is fit: it stands in where none of a micro-batch is.

        Raises:
            DataError: there is none.
        """
        if self.problem is None or self.filler is not None:
            return
        first = ""
        for row in range(len(self.dataset)):
            columns = self.dataset[[row]]
            (fault,) = self._faults(columns)
            if not fault:
                self.filler = row
                return
            first = first or f"sample {columns['id'][0]}: {fault}"
        raise DataError(
            f"none of the {len(self.dataset)} samples can be used; the first is {first}",
            "Prepare the data with the tokenizer and the classes of this model.",
        )

    def _faults(self, columns: Columns) -> list[str]:
        """Of each row, or nothing where none is looked for."""
        if self.problem is None:
            return []
        return [self.problem(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
