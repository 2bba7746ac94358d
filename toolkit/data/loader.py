"""The order of the samples and their way to the ranks.

The order is a pure function of (seed, epoch); the samples of a step are taken from it globally and then dealt to
the ranks. So nothing depends on the number of ranks, and the state of the data is one integer: samples consumed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
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
Planned = tuple[list[int], bool, int | None]
"""The same with the epoch, or None in an evaluation."""


@dataclass
class Step:
    """What one rank does in one optimizer step.

    Attributes:
        number: of the optimizer step; the first is 1.
        epoch: 0-based.
        micro_batches: of this rank; every rank has as many.
        samples: of all ranks, unfit ones among them.
        samples_seen: of all ranks in all steps up to and with this one.
        imbalance: by how much the dearest rank's work exceeds the mean, as a share of the mean.
    """

    number: int
    epoch: int
    micro_batches: list[Any]
    samples: int
    samples_seen: int
    imbalance: float = 0.0

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


@dataclass(frozen=True)
class Hand:
    """What one rank is dealt of a step: its micro-batches, and what they cost together."""

    forwards: list[Forward]
    cost: float


def deal(rows: Sequence[int], costs: Sequence[float], shape: BatchShape) -> list[Hand]:
    """The hands of all ranks for the rows of one step.

    The dearest row that is left goes to the rank that has least to do (longest processing time first, Graham 1969),
    unless that rank would then pad to more than an equal deal could. Every rank gets equally many micro-batches of
    about the same cost; one without rows gets a filler, because a sharded model computes together or not at all.

    Args:
        rows: of all ranks.
        costs: of each of them, above 0.
        shape: of the batches.
    """
    forwards = math.ceil(math.ceil(len(rows) / shape.ranks) / shape.micro_batch)
    order = sorted(range(len(rows)), key=lambda index: -costs[index])
    room = forwards * shape.micro_batch * costs[order[0]]
    loads, held = [(0.0, rank) for rank in range(shape.ranks)], [list[int]() for _ in range(shape.ranks)]
    for index in order:
        load, rank = heapq.heappop(loads)
        mine = held[rank]
        mine.append(index)
        if (len(mine) + 1) * costs[mine[0]] <= room:
            heapq.heappush(loads, (load + costs[index], rank))
    filler: Forward = ([rows[order[-1]]], True)
    hands = []
    for mine in held:
        chunks = _cut(mine, costs, forwards)
        dealt = [([rows[index] for index in chunk], False) if chunk else filler for chunk in chunks]
        hands.append(Hand(dealt, sum(costs[index] for index in mine)))
    return hands


def _cut(hand: Sequence[int], costs: Sequence[float], parts: int) -> list[list[int]]:
    """`hand`, dearest first, in neighbours of about the same cost; the last are empty where it is too small."""
    chunks, rest, start = [], sum(costs[index] for index in hand), 0
    for left in range(parts, 0, -1):
        goal, cost, end = rest / left, 0.0, start
        while end < len(hand) - (left - 1) and (end == start or left == 1 or cost + costs[hand[end]] / 2 <= goal):
            cost += costs[hand[end]]
            end += 1
        if end == start and end < len(hand):  # fewer than micro-batches
            cost, end = costs[hand[end]], end + 1
        chunks.append(list(hand[start:end]))
        rest, start = rest - cost, end
    return chunks


class Loader:
    """Batches of an Arrow data set for one rank.

    Args:
        dataset: rows by index, one at least; `dataset[[3, 5]]` gives columns.
        collate: columns, and whether they are filler, to a batch (a task's method). In training, and nowhere else,
            there is a column `epoch` (int, from 0), by which samples may be varied.
        shape: of the batches, over how many ranks.
        rank: this one.
        seed: of the order.
        workers: processes that collate; 0 collates in this one.
        pin_memory: for copies to a GPU.
        width: the model's hidden size, by which a row's cost is judged.
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
        width: int = 768,
        problem: Problem | None = None,
    ) -> None:
        assert len(dataset) > 0, "without rows there is no next step to wait for"
        self.dataset = dataset
        self.shape = shape
        self.rank = rank
        self.seed = seed
        self._lengths = dataset["length"]
        self._rows = _Rows(dataset, collate, problem)
        self._workers = workers
        self._pin_memory = pin_memory
        self._width = width

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
            return islice(self._plans(from_step), total_steps - from_step)

        batches = self._stream(lambda: ((*forward, step.epoch) for step, forwards in plans() for forward in forwards))
        for step, forwards in plans():
            step.micro_batches = list(islice(batches, len(forwards)))
            yield step

    def once(self) -> Iterator[Any]:
        """The micro-batches of this rank in one pass over all samples, each of which one rank has exactly once.

        Samples of like length stand together, so that little is padded.

        Raises:
            DataError: no row is fit.
        """
        costs = self._costs(slice(None))
        rows = np.argsort(-costs, kind="stable").tolist()
        per_step = self.shape.micro_batch * self.shape.ranks
        chunks = [rows[start : start + per_step] for start in range(0, len(rows), per_step)]

        def forwards() -> Iterator[Planned]:
            for chunk in chunks:
                for rows, empty in deal(chunk, costs[chunk].tolist(), self.shape)[self.rank].forwards:
                    yield rows, empty, None

        return self._stream(forwards)

    @property
    def forwards_of_one_pass(self) -> int:
        """Number of micro-batches that `once` gives."""
        return math.ceil(len(self.dataset) / (self.shape.micro_batch * self.shape.ranks))

    def _plans(self, from_step: int) -> Iterator[tuple[Step, list[Forward]]]:
        number, size = from_step, self.shape.global_batch
        epoch, done = divmod(from_step, self.steps_per_epoch)
        seen = epoch * len(self.dataset) + done * size
        while True:
            order = epoch_order(self.seed, epoch, len(self.dataset)).tolist()
            for start in range(done * size, len(order), size):
                rows = order[start : start + size]
                number, seen = number + 1, seen + len(rows)
                hands = deal(rows, self._costs(rows).tolist(), self.shape)
                loads = [hand.cost for hand in hands]
                imbalance = max(loads) / (sum(loads) / len(loads)) - 1
                yield Step(number, epoch, [], len(rows), seen, imbalance), hands[self.rank].forwards
            epoch, done = epoch + 1, 0

    def _costs(self, rows: Any) -> npt.NDArray[np.float64]:
        """Of rows with so many tokens: products with weights, and attention (Narayanan et al. 2021, equation 3)."""
        lengths = np.asarray(self._lengths[rows], dtype=np.float64)
        lengths = np.nan_to_num(lengths).clip(0.5)  # one that is missing counts for little, and comes last
        return lengths * (1 + lengths / (6 * self._width))

    def _stream(self, forwards: Callable[[], Iterator[Planned]]) -> Iterator[Any]:
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

    def __init__(self, forwards: Callable[[], Iterator[Planned]]) -> None:
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
        rows, empty, epoch = forward
        columns = self.dataset[rows]
        faults = self._faults(columns)
        if not any(faults):
            return self.collate(_dated(columns, epoch), empty)
        # The row of a filler is reported where it was dealt.
        skipped = [] if empty else [(id_, fault) for id_, fault in zip(columns["id"], faults, strict=True) if fault]
        fit = [row for row, fault in zip(rows, faults, strict=True) if not fault]
        batch = self.collate(_dated(self.dataset[fit or [self.filler]], epoch), empty or not fit)
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


def _dated(columns: Columns, epoch: int | None) -> Columns:
    """With the epoch, where there is one."""
    return columns if epoch is None else {**columns, "epoch": [epoch] * len(next(iter(columns.values())))}
