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
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset, Sampler

from toolkit.errors import ConfigError

Collate = Callable[[Mapping[str, Sequence[Any]], bool], Any]
Forward = tuple[list[int], bool]
"""Rows of one micro-batch of one rank, and whether they are filler."""


@dataclass
class Step:
    """What one rank does in one optimizer step.

    Attributes:
        number: of the optimizer step; the first is 1.
        epoch: 0-based.
        micro_batches: of this rank; every rank has as many.
        samples: of all ranks.
        samples_seen: of all ranks in all steps up to and with this one.
    """

    number: int
    epoch: int
    micro_batches: list[Any]
    samples: int
    samples_seen: int


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


def epoch_order(seed: int, epoch: int, samples: int) -> npt.NDArray[np.int64]:
    """Rows of the data set in the order of this epoch: a pure function of its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(samples)


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
    ) -> None:
        assert len(dataset) > 0, "without rows there is no next step to wait for"
        self.dataset = dataset
        self.shape = shape
        self.rank = rank
        self.seed = seed
        self._rows = _Rows(dataset, collate)
        self._workers = workers
        self._pin_memory = pin_memory

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; the last may be smaller than the others."""
        return math.ceil(len(self.dataset) / self.shape.global_batch)

    def steps(self, total_steps: int, from_step: int = 0) -> Iterator[Step]:
        """The steps after `from_step` up to `total_steps`."""

        def plans() -> Iterator[tuple[Step, list[Forward]]]:
            return islice(self._plans(), from_step, total_steps)

        batches = self._stream(lambda: (forward for _, forwards in plans() for forward in forwards))
        for step, forwards in plans():
            step.micro_batches = list(islice(batches, len(forwards)))
            yield step

    def once(self) -> Iterator[Any]:
        """The micro-batches of this rank in one pass over all samples, each of which one rank has exactly once.

        Samples of like length stand together, so that little is padded.
        """
        lengths = np.asarray(self.dataset["length"])
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
        loader: DataLoader[Any] = DataLoader(
            self._rows,
            sampler=_Forwards(forwards),
            batch_size=None,
            num_workers=self._workers,
            pin_memory=self._pin_memory,
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

    def __init__(self, dataset: Any, collate: Collate) -> None:
        self.dataset = dataset
        self.collate = collate

    def __getitem__(self, forward: Any) -> Any:
        rows, empty = forward
        return self.collate(self.dataset[rows], empty)
