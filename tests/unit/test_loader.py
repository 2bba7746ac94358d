"""The order of the samples and their way to the ranks, over all small cases rather than a few chosen ones."""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from toolkit.data.loader import BatchShape, Loader, batch_shape, deal, epoch_order
from toolkit.errors import ConfigError, DataError

WORLDS = range(1, 6)


class Rows:
    """A data set whose rows are their numbers; long enough texts of it stand first in an evaluation."""

    def __init__(self, count: int) -> None:
        self.lengths = [(7 * row) % 5 for row in range(count)]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        assert index == "length" or isinstance(index, list)
        return np.array(self.lengths) if index == "length" else {"id": index}


def collate(columns: Mapping[str, Sequence[Any]], empty: bool) -> list[Any]:
    return [list(columns["id"]), empty]


def shapes() -> Iterator[BatchShape]:
    """Every way to cut up to three samples a micro-batch and three micro-batches over up to five ranks."""
    for ranks, micro_batch, accumulation in itertools.product(WORLDS, (1, 2, 3), (1, 2, 3)):
        yield BatchShape(ranks * micro_batch * accumulation, micro_batch, accumulation, ranks)


def loaders(count: int, shape: BatchShape, seed: int = 0) -> list[Loader]:
    return [Loader(Rows(count), collate, shape, rank=rank, seed=seed) for rank in range(shape.ranks)]


def real(forwards: list[Any]) -> list[int]:
    """The rows that count, of the micro-batches of one rank."""
    return [row for rows, empty in forwards if not empty for row in rows]


# The order.


def test_order_is_a_permutation() -> None:
    for samples in (1, 2, 7, 100):
        assert sorted(epoch_order(3, 5, samples).tolist()) == list(range(samples))


def test_order_is_a_pure_function() -> None:
    code = "from toolkit.data.loader import epoch_order; print(epoch_order(3, 5, 50).tolist())"
    np.random.seed(99)
    here = epoch_order(3, 5, 50).tolist()
    np.random.seed(1)
    assert epoch_order(3, 5, 50).tolist() == here
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.strip() == str(here)


def test_order_never_changes_between_releases() -> None:
    """A run that is resumed with a newer version must go on in the order that it began with."""
    assert epoch_order(0, 0, 10).tolist() == [4, 6, 2, 7, 3, 5, 9, 0, 8, 1]
    assert epoch_order(0, 1, 10).tolist() == [9, 1, 3, 8, 7, 6, 0, 4, 2, 5]
    assert epoch_order(7, 0, 10).tolist() == [8, 0, 7, 1, 3, 6, 2, 4, 5, 9]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


# Dealing.


def check_dealt(rows: list[int], costs: list[float], shape: BatchShape) -> list[list[list[int]]]:
    """What holds of any deal; the rows of each rank's micro-batches."""
    hands = deal(rows, costs, shape)
    cost_of = dict(zip(rows, costs, strict=True))
    assert sorted(row for hand in hands for row in real(hand.forwards)) == sorted(rows)
    (forwards,) = {len(hand.forwards) for hand in hands}
    # No more than the largest share needs, so that a ragged step is no longer than it must be.
    assert forwards == math.ceil(math.ceil(len(rows) / shape.ranks) / shape.micro_batch) <= shape.accumulation
    for hand in hands:
        mine = real(hand.forwards)
        assert hand.cost == pytest.approx(sum(cost_of[row] for row in mine))
        assert len(mine) >= min(1, len(rows) // shape.ranks)
        assert sum(not empty for _, empty in hand.forwards) == min(len(mine), forwards)
        assert all(len(chunk) == 1 for chunk, empty in hand.forwards if empty)
        room = forwards * shape.micro_batch * max(costs)
        assert len(mine) * max((cost_of[row] for row in mine), default=0) <= room
    return [[chunk for chunk, empty in hand.forwards if not empty] for hand in hands]


def test_rows_of_one_length_are_dealt_like_cards() -> None:
    cases = 0
    for shape in shapes():
        for count in range(1, shape.global_batch + 1):
            dealt = check_dealt(list(range(100, 100 + count)), [1.0] * count, shape)
            shares = [sum(map(len, chunks)) for chunks in dealt]
            assert max(shares) - min(shares) <= 1
            assert all(1 <= len(chunk) <= shape.micro_batch for chunks in dealt for chunk in chunks)
            cases += 1
        assert {len(chunk) for chunks in dealt for chunk in chunks} == {shape.micro_batch}
    assert cases > 500


def test_rows_of_many_lengths_are_dealt_by_cost() -> None:
    rng = np.random.default_rng(0)
    for shape in shapes():
        for count in range(1, shape.global_batch + 1, 3):
            check_dealt(list(range(count)), rng.lognormal(3.9, 0.7, count).tolist(), shape)


def test_ranks_and_micro_batches_get_work_of_the_same_size() -> None:
    rng, shape = np.random.default_rng(0), BatchShape(256, 16, 4, 4)
    for _ in range(20):
        costs = rng.lognormal(3.9, 0.7, 256).clip(8, 256).tolist()
        dealt = check_dealt(list(range(256)), costs, shape)
        loads = [sum(costs[row] for chunk in chunks for row in chunk) for chunks in dealt]
        assert max(loads) < 1.01 * sum(loads) / 4
        by_cards = [sum(costs[rank::4]) for rank in range(4)]
        assert max(by_cards) - min(by_cards) > 10 * (max(loads) - min(loads))
        chunks = [sum(costs[row] for row in chunk) for chunks in dealt for chunk in chunks]
        assert max(chunks) < 1.3 * sum(chunks) / 16


def test_dealing_by_hand() -> None:
    shape, rows, costs = BatchShape(12, 2, 2, 3), [10, 11, 12, 13, 14, 15, 16], [1.0, 9.0, 2.0, 2.0, 3.0, 4.0, 1.0]
    assert [hand.cost for hand in deal(rows, costs, shape)] == [9, 7, 6]
    assert [hand.forwards for hand in deal(rows, costs, shape)] == [
        [([11], False), ([16], True)],
        [([15], False), ([13, 16], False)],
        [([14], False), ([12, 10], False)],
    ]


def test_a_step_says_how_far_the_ranks_are_apart() -> None:
    steps = [list(loader.steps(3)) for loader in loaders(30, BatchShape(10, 5, 1, 2))]
    assert [step.imbalance for step in steps[0]] == [step.imbalance for step in steps[1]]
    assert all(0 <= step.imbalance < 0.1 for step in steps[0])
    (alone,) = loaders(30, BatchShape(10, 5, 2, 1))
    assert [step.imbalance for step in alone.steps(3)] == [0, 0, 0]


# Steps.


def test_steps_are_the_order_cut_whatever_the_ranks() -> None:
    for shape in shapes():
        for count in (shape.global_batch, 2 * shape.global_batch + 1, 3 * shape.global_batch - 1):
            steps_per_epoch = math.ceil(count / shape.global_batch)
            total = 2 * steps_per_epoch + 1
            seen = 0
            for number, ranks in enumerate(
                zip(*(loader.steps(total) for loader in loaders(count, shape, seed=4)), strict=True), start=1
            ):
                epoch, index = divmod(number - 1, steps_per_epoch)
                order = epoch_order(4, epoch, count).tolist()
                rows = order[index * shape.global_batch : (index + 1) * shape.global_batch]
                seen += len(rows)
                assert Counter(itertools.chain.from_iterable(real(s.micro_batches) for s in ranks)) == Counter(rows)
                assert {(s.number, s.epoch, s.samples, s.samples_seen) for s in ranks} == {
                    (number, epoch, len(rows), seen)
                }
                assert len({len(s.micro_batches) for s in ranks}) == 1
            assert number == total


def test_every_sample_is_seen_once_an_epoch() -> None:
    shape = BatchShape(12, 2, 2, 3)
    per_epoch: dict[int, list[int]] = {}
    for loader in loaders(31, shape):
        for step in loader.steps(2 * loader.steps_per_epoch):
            per_epoch.setdefault(step.epoch, []).extend(real(step.micro_batches))
    assert {epoch: sorted(rows) for epoch, rows in per_epoch.items()} == {0: list(range(31)), 1: list(range(31))}


def test_steps_go_on_where_they_were_left() -> None:
    for shape in (BatchShape(4, 4, 1, 1), BatchShape(12, 2, 2, 3)):
        for loader in loaders(31, shape):
            whole = list(loader.steps(9))
            assert [step.number for step in whole] == list(range(1, 10))
            for done in range(10):
                assert list(loader.steps(9, from_step=done)) == whole[done:]


def test_steps_go_on_over_other_ranks() -> None:
    """What three ranks have not seen after step 4, five ranks see, and nothing else."""
    before, after = batch_shape(30, 2, 3), batch_shape(30, 3, 5)
    rows: list[int] = []
    for loader in loaders(200, before):
        rows.extend(row for step in loader.steps(4) for row in real(step.micro_batches))
    for loader in loaders(200, after):
        rows.extend(row for step in loader.steps(7, from_step=4) for row in real(step.micro_batches))
    assert sorted(rows) == list(range(200))


def test_steps_per_epoch() -> None:
    for count, global_batch, steps in ((1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2)):
        assert Loader(Rows(count), collate, BatchShape(global_batch, 4, 1, 1)).steps_per_epoch == steps


# One pass.


def test_one_pass_gives_each_row_once_over_all_ranks() -> None:
    for ranks, micro_batch, count in itertools.product(WORLDS, (1, 2, 3, 8), range(1, 26)):
        shape = BatchShape(0, micro_batch, 1, ranks)
        passes = [list(loader.once()) for loader in loaders(count, shape)]
        assert sorted(itertools.chain.from_iterable(map(real, passes))) == list(range(count))
        assert {len(forwards) for forwards in passes} == {math.ceil(count / (micro_batch * ranks))}
        assert loaders(count, shape)[0].forwards_of_one_pass == len(passes[0])


def test_one_pass_puts_like_lengths_together() -> None:
    (loader,) = loaders(25, BatchShape(0, 5, 1, 1))
    lengths = [[loader.dataset.lengths[row] for row in rows] for rows, _ in loader.once()]
    assert lengths == [[4] * 5, [3] * 5, [2] * 5, [1] * 5, [0] * 5]


# Workers.


@functools.cache
def arrow() -> Dataset:
    return Dataset.from_dict({"id": list(range(23)), "length": [row % 4 for row in range(23)]})


def test_workers_change_nothing() -> None:
    for rank in range(2):
        plain, forked = (
            Loader(arrow(), collate, BatchShape(6, 2, 2, 2), rank=rank, seed=1, workers=workers) for workers in (0, 2)
        )
        assert list(forked.steps(5, from_step=2)) == list(plain.steps(5, from_step=2))
        assert list(forked.once()) == list(plain.once())


def test_arrow_data_set_gives_the_rows() -> None:
    (step,) = Loader(arrow(), collate, BatchShape(6, 3, 2, 1), seed=1).steps(1)
    order = epoch_order(1, 0, 23).tolist()
    assert sorted(real(step.micro_batches)) == sorted(order[:6])
    assert [empty for _, empty in step.micro_batches] == [False, False]


def test_no_data_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        Loader(Rows(0), collate, BatchShape(6, 3, 2, 1))


# Unfit rows.


@dataclass
class Taken:
    """A micro-batch that notes its rows."""

    rows: list[int]
    empty: bool
    skipped: list[tuple[int, str]] = field(default_factory=list)


def take(columns: Mapping[str, Sequence[Any]], empty: bool) -> Taken:
    return Taken(list(columns["id"]), empty)


def unfit_from(*bad: int) -> Any:
    """A check that finds fault with these rows."""
    return lambda row: f"{row['id']} is bad" if row["id"] in bad else ""


def faults(rows: Any) -> list[tuple[int, str]]:
    return [(row, f"{row} is bad") for row in rows]


def picky(count: int, shape: BatchShape, bad: Sequence[int]) -> list[Loader]:
    problem = unfit_from(*bad)
    return [Loader(Rows(count), take, shape, rank=rank, problem=problem) for rank in range(shape.ranks)]


def check_taken(taken: list[list[Taken]], planned: list[list[Any]], bad: set[int]) -> None:
    """What was planned for each rank, less the bad rows, each of which is reported where it was dealt."""
    for of_rank, plan in zip(taken, planned, strict=True):
        assert len(of_rank) == len(plan)
        for batch, (rows, empty) in zip(of_rank, plan, strict=True):
            fit = [row for row in rows if row not in bad]
            assert (batch.empty, batch.skipped) == (
                empty or not fit,
                [] if empty else faults(r for r in rows if r in bad),
            )
            # The filler is a row that is fit, even where the one that was dealt is not.
            assert batch.rows == fit if fit else (len(batch.rows) == 1 and batch.rows[0] not in bad)


def test_unfit_rows_are_left_out_and_all_else_stays() -> None:
    generator = np.random.default_rng(0)
    cases = 0
    for shape in shapes():
        for count in sorted({1, 2, shape.global_batch // 2 + 1, min(12, shape.global_batch + 1)}):
            bad = generator.permutation(count)[: generator.integers(0, count)].tolist()
            steps = list(zip(*(loader.steps(3) for loader in picky(count, shape, bad)), strict=True))
            plans = list(zip(*(loader.steps(3) for loader in loaders(count, shape)), strict=True))
            for step, plan in zip(steps, plans, strict=True):
                check_taken([of.micro_batches for of in step], [of.micro_batches for of in plan], set(bad))
                assert {(s.number, s.samples, s.samples_seen) for s in step} == {
                    (s.number, s.samples, s.samples_seen) for s in plan
                }
            evaluations = [list(loader.once()) for loader in picky(count, shape, bad)]
            check_taken(evaluations, [list(loader.once()) for loader in loaders(count, shape)], set(bad))
            cases += bool(bad)
    assert cases > 50


def test_a_step_names_the_unfit_rows_that_were_dealt_to_this_rank() -> None:
    shape = BatchShape(12, 2, 3, 2)
    first, second = (real(next(loader.steps(1)).micro_batches) for loader in loaders(12, shape))
    plan = next(loaders(12, shape)[1].steps(1)).micro_batches
    bad = [first[-1], *plan[0][0], plan[2][0][0]]
    of_first, of_second = (next(loader.steps(1)) for loader in picky(12, shape, bad))
    assert of_first.skipped == faults(bad[:1])
    # The second rank's first micro-batch is bad as a whole, and a part of its second.
    assert of_second.skipped == faults(bad[1:])
    assert [batch.empty for batch in of_second.micro_batches] == [True, False, False]
    assert [batch.empty for batch in of_first.micro_batches] == [False] * 3
    assert len(first) + len(second) == 12


def test_the_filler_of_an_unfit_row_reports_nothing() -> None:
    """A step of one row, which is bad: it is dealt to the first rank, and lent to the others as filler."""
    shape = BatchShape(3, 1, 1, 3)
    last = epoch_order(0, 0, 4).tolist()[3]
    of_ranks = [list(loader.steps(2))[1] for loader in picky(4, shape, [last])]
    assert [step.skipped for step in of_ranks] == [faults([last]), [], []]
    assert all(batch.empty and batch.rows != [last] for step in of_ranks for batch in step.micro_batches)


def test_workers_leave_out_the_same() -> None:
    problem = unfit_from(0, 1, 5, 13, 20)
    for rank in range(2):
        plain, forked = (
            Loader(arrow(), take, BatchShape(6, 2, 2, 2), rank=rank, seed=1, workers=workers, problem=problem)
            for workers in (0, 2)
        )
        assert list(forked.steps(5, from_step=2)) == list(plain.steps(5, from_step=2))
        found = list(forked.once())
        assert found == list(plain.once())
        assert any(batch.skipped for batch in found)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_row_is_fit(workers: int) -> None:
    loader = Loader(arrow(), take, BatchShape(6, 2, 2, 2), workers=workers, problem=unfit_from(*range(23)))
    for first in (lambda: next(loader.steps(1)), loader.once):
        with pytest.raises(DataError) as caught:
            first()
        assert caught.value.message == "none of the 23 samples can be used; the first is sample 0: 0 is bad"
        assert "tokenizer" in caught.value.remedy


def test_what_fails_for_another_reason_still_fails() -> None:
    def spill(columns: Mapping[str, Sequence[Any]], empty: bool) -> Any:
        raise ArithmeticError("not the rows' fault")

    loader = Loader(arrow(), spill, BatchShape(6, 6, 1, 1), problem=unfit_from(3))
    with pytest.raises(ArithmeticError, match="not the rows' fault"):
        next(loader.steps(1))


def test_a_missing_length_does_not_stop_an_evaluation() -> None:
    data = Dataset.from_dict({"id": [0, 1, 2], "length": [4, None, 5]})
    taken = list(Loader(data, take, BatchShape(0, 2, 1, 1), problem=unfit_from(1)).once())
    assert taken == [Taken([2, 0], False), Taken([0], True, faults([1]))]


# The shape of a batch.


def test_shape_is_the_product() -> None:
    for ranks in WORLDS:
        for share in range(1, 70):
            shape = batch_shape(ranks * share, None, ranks)
            assert shape.micro_batch * shape.accumulation * shape.ranks == shape.global_batch == ranks * share
            # The largest divisor up to 32.
            assert shape.micro_batch == max(size for size in range(1, 33) if share % size == 0)


def test_shape_as_asked() -> None:
    assert batch_shape(48, 4, 3) == BatchShape(48, 4, 4, 3)
    assert batch_shape(128, None, 1) == BatchShape(128, 32, 4, 1)
    assert batch_shape(128, 128, 1) == BatchShape(128, 128, 1, 1)
    assert batch_shape(37, None, 1) == BatchShape(37, 1, 37, 1)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "ranks", "message", "remedy"),
    [
        (32, None, 3, "--train.global_batch 32 cannot be divided over 3 ranks", "Use 30 or 33, or another number"),
        (2, None, 3, "--train.global_batch 2 cannot be divided over 3 ranks", "Use 3, or another number"),
        (
            32,
            3,
            2,
            "32 over 2 ranks is 16 samples a rank, which --train.micro_batch 3 does not divide",
            "1, 2, 4, 8, 16",
        ),
        (32, 32, 2, "16 samples a rank, which --train.micro_batch 32 does not divide", "Use a micro-batch of 1, 2, 4"),
    ],
)
def test_shapes_that_cannot_be(
    global_batch: int, micro_batch: int | None, ranks: int, message: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        batch_shape(global_batch, micro_batch, ranks)
    assert message in caught.value.message
    assert remedy in caught.value.remedy
