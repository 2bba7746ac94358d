"""The account of a run's samples: the proof that none was lost or seen twice, from what its ranks really consumed.

Attempts are replayed in order. One that goes on from a step undoes what those before it did past that step, so each
step counts where it was computed last.
"""

from __future__ import annotations

import json
import math
import operator
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from toolkit.checkpoint.attempts import Attempt, Attempts, ledgers
from toolkit.checkpoint.ledger import IDS, PLAN
from toolkit.checkpoint.lines import changed, read_lines, reading
from toolkit.errors import CheckpointError
from toolkit.order import epoch_order

LISTED = 1000
"""Samples that are named of each kind; all are counted."""
CHUNK = 1 << 20
"""Samples that are looked up at once."""
LAST = 1 << 31
"""Steps are kept in 32 bits."""
LOOKS = 20
"""Looks at the sizes of the files, until two are alike."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """What one attempt has added.

    Attributes:
        attempt: its number.
        from_step, to_step: the steps that count are those after the first, up to and with the last.
        status: how it ended; `killed` is also what still runs.
        ranks: that it was begun with; None where it does not say.
        ledgers: ranks that have left one.
    """

    attempt: int
    from_step: int
    to_step: int
    status: str
    ranks: int | None
    ledgers: int


@dataclass
class Account:
    """What became of the samples that the plan gives to the steps of a run.

    Attributes:
        lost: number that no rank has computed or skipped, of those that it should have by then.
        duplicate: number of times that one was seen once more in the same epoch.
        misplaced: number seen in another step than the plan's, or unknown to the plan.
        in_flight: number of the last step that a rank did not get to before it was killed (or has not yet).
        samples: number of those that were computed.
        steps: that all ranks have done.
        epochs: that are complete.
        lost_ids, duplicate_ids, misplaced_ids: epoch and id of the first thousand of each.
        skipped: epoch, id and reason of each sample that was left out on purpose.
        parts: what each attempt has added.
    """

    lost: int = 0
    duplicate: int = 0
    misplaced: int = 0
    in_flight: int = 0
    samples: int = 0
    steps: int = 0
    epochs: int = 0
    lost_ids: list[tuple[int, int]] = field(default_factory=list)
    duplicate_ids: list[tuple[int, int]] = field(default_factory=list)
    misplaced_ids: list[tuple[int, int]] = field(default_factory=list)
    skipped: list[tuple[int, int, str]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether every sample was seen once, where it should have been."""
        return not (self.lost or self.duplicate or self.misplaced)

    def to_json(self) -> dict[str, Any]:
        """All of it, in what JSON knows; `ranks` are those seen in each attempt."""
        ranks = [part.ledgers for part in self.parts]
        return asdict(self) | {"sound": self.sound, "attempts": len(self.parts), "ranks": ranks}


def account(run: Path) -> Account:
    """Hold what the ranks of a run have consumed against its plan. The run may be going on.

    Raises:
        CheckpointError: there is no ledger, or a line of it is not what was written.
    """
    attempts = Attempts(run).read()
    if not attempts:
        raise CheckpointError(f"{run} has no attempts.jsonl", "Name the folder of a run that has been started.")
    files = _files(run, attempts)
    tally = _Tally(_Plan(run), Account())
    ends: dict[int, int] = {}
    for index, attempt in enumerate(attempts):
        undone_after = min((later.from_step for later in attempts[index + 1 :]), default=None)
        ends = {rank: tally.enter(path, size, undone_after) for rank, path, size in files[index]}
        to_step, ranks = max([attempt.from_step, *ends.values()]), _ranks(attempt)
        part = Part(attempt.number, attempt.from_step, to_step, attempt.status, ranks, len(ends))
        tally.account.parts.append(part)
    tally.judge(*_end(attempts[-1], ends))
    return tally.account


def _files(run: Path, attempts: Sequence[Attempt]) -> list[list[tuple[int, Path, int]]]:
    """Of each attempt: the rank, path and size of its ledgers, all at one moment.

    The ranks may go on: those that are read last would seem to be many steps ahead.
    """
    found: list[list[tuple[int, Path, int]]] = []
    for _ in range(LOOKS):
        before = found
        found = [[(rank, path, path.stat().st_size) for rank, path in ledgers(run, a.number).items()] for a in attempts]
        if found == before:
            break
    return found


def _end(attempt: Attempt, ends: dict[int, int]) -> tuple[int, int]:
    """The last step that should have been consumed, and the one that was under way at the end of all; 0 if none was.

    Ranks meet in every step, so they cannot be further apart than one: what is missing beyond that was lost.
    """
    # A rank without a ledger has not come further than where the attempt began.
    ranks = {*range(_ranks(attempt) or 0), *ends}
    reached = [max(attempt.from_step, ends.get(rank, 0)) for rank in ranks] or [attempt.from_step]
    if attempt.status == "finished":
        return max(*reached, attempt.ended_at or 0), 0
    last = max(reached)
    return last, last if min(reached) == last - 1 else 0


def _ranks(attempt: Attempt) -> int | None:
    ranks = attempt.facts.get("ranks")
    return ranks if isinstance(ranks, int) else None


class _Plan:
    """Which samples there are, and which step consumes which of them."""

    def __init__(self, run: Path) -> None:
        path, ids = run / "samples" / PLAN, run / "samples" / IDS
        try:
            with reading(path):
                plan = json.loads(path.read_bytes())
            with reading(ids):
                self.ids: Integers = load_file(ids)["ids"]
            self.seed, self.global_batch = int(plan["seed"]), int(plan["global_batch"])
            fits = int(plan["samples"]) == len(self.ids) and self.global_batch > 0
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _no_plan(run) from error
        self._rows = np.argsort(self.ids, kind="stable")
        self._sorted = self.ids[self._rows]
        if not fits or not len(self.ids) or np.any(self._sorted[1:] == self._sorted[:-1]):
            raise _no_plan(run)
        self.steps_per_epoch = math.ceil(len(self.ids) / self.global_batch)

    def rows(self, ids: Integers) -> Integers:
        """The row of each of these ids, which ascend; -1 of one that there is none of."""
        places = np.searchsorted(self._sorted, ids).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[places] == ids, self._rows[places], -1)

    def epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """The rows in the order of this epoch, and the step of each."""
        steps = 1 + epoch * self.steps_per_epoch + np.arange(len(self.ids)) // self.global_batch
        return epoch_order(self.seed, epoch, len(self.ids)), steps


class _Tally:
    """Of each sample in each epoch, the step that it was first seen in.

    Args:
        plan: of the run.
        account: to fill.
    """

    def __init__(self, plan: _Plan, account: Account) -> None:
        self.account = account
        self._plan = plan
        self._first: dict[int, npt.NDArray[np.int32]] = {}

    def enter(self, path: Path, size: int, undone_after: int | None) -> int:
        """Enter one ledger, without the steps that a later attempt has undone; the last step that counts."""
        last = 0
        for epoch, steps, counts, ids in self._chunks(path, size, undone_after):
            last = max(last, max(steps))
            self._see(epoch, np.repeat(_integers(steps), _integers(counts)), _integers(ids))
        return last

    def judge(self, last: int, partial: int) -> None:
        """Find what is missing of the steps up to `last`, of which `partial`, if not 0, was under way."""
        account, plan = self.account, self._plan
        for epoch in sorted({*range(math.ceil(last / plan.steps_per_epoch)), *self._first}):
            rows, planned = plan.epoch(epoch)
            first = self._first[epoch][rows] if epoch in self._first else np.zeros(len(rows), dtype=np.int32)
            missing = (first == 0) & (planned <= last)
            under_way = missing & (planned == partial)
            account.in_flight += int(np.count_nonzero(under_way))
            account.lost += _note(account.lost_ids, epoch, plan.ids[rows[missing & ~under_way]])
            elsewhere = (first != 0) & (first != planned)
            account.misplaced += _note(account.misplaced_ids, epoch, plan.ids[rows[elsewhere]])
        account.steps = last - (partial > 0)
        account.epochs = account.steps // plan.steps_per_epoch

    def _chunks(
        self, path: Path, size: int, undone_after: int | None
    ) -> Iterator[tuple[int, Sequence[int], Sequence[int], Sequence[int]]]:
        """Of many lines of one epoch each: the epoch; step and number of samples by line; the samples."""
        steps, counts, ids = array("q"), array("q"), array("q")
        current = 0
        for number, line in read_lines(path, size):
            try:
                step, epoch, computed, skipped = self._line(line)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise changed(path, number, "it is no step of this run") from error
            if undone_after is not None and step > undone_after:
                continue
            if steps and (epoch != current or len(ids) >= CHUNK):
                yield current, steps, counts, ids
                steps, counts, ids = array("q"), array("q"), array("q")
            current = epoch
            steps.append(step)
            counts.append(len(computed) + len(skipped))
            ids.extend(computed)
            ids.extend(sample for _, sample, _ in skipped)
            self.account.samples += len(computed)
            self.account.skipped += skipped
        if steps:
            yield current, steps, counts, ids

    def _line(self, line: dict[str, Any]) -> tuple[int, int, array[int], list[tuple[int, int, str]]]:
        """Step, epoch, samples computed, samples skipped."""
        step, epoch = operator.index(line["step"]), operator.index(line["epoch"])
        if not 0 < step < LAST or epoch != (step - 1) // self._plan.steps_per_epoch:
            raise ValueError(line)
        skipped = [(epoch, operator.index(sample), str(reason)) for sample, reason in line.get("skipped", ())]
        return step, epoch, array("q", line["ids"]), skipped

    def _see(self, epoch: int, steps: Integers, ids: Integers) -> None:
        first = self._first.setdefault(epoch, np.zeros(len(self._plan.ids), dtype=np.int32))
        known, places = np.unique(ids, return_index=True)
        again = np.ones(len(ids), dtype=bool)
        again[places] = False
        rows = self._plan.rows(known)
        again[places[(rows >= 0) & (first[rows] != 0)]] = True
        self.account.duplicate += _note(self.account.duplicate_ids, epoch, ids[again])
        self.account.misplaced += _note(self.account.misplaced_ids, epoch, known[rows < 0])
        new = (rows >= 0) & ~again[places]
        first[rows[new]] = steps[places[new]]


def _integers(values: Sequence[int]) -> Integers:
    return np.array(values, dtype=np.int64)


def _note(listed: list[tuple[int, int]], epoch: int, ids: Integers) -> int:
    """Name the first of them; how many they are."""
    listed += [(epoch, sample) for sample in ids[: max(0, LISTED - len(listed))].tolist()]
    return len(ids)


def _no_plan(run: Path) -> CheckpointError:
    return CheckpointError(
        f"{run / 'samples'}: {PLAN} and {IDS} are not the plan of one run, in which each sample has its own id",
        "The files were changed after they were written: take them from a backup.",
    )
