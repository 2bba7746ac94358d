"""The attempts of a run: each start of it, and each rewind, with how it ended.

An attempt goes on from a step and undoes what came after it. One that has no end was killed. Rank 0 alone writes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from toolkit.checkpoint.lines import append, changed, last_line, read_lines
from toolkit.folders import Guard, unguarded

KILLED, RUNNING, REWOUND = "killed", "running", "rewound"
CRASHES = (KILLED, "failed")


@dataclass(frozen=True)
class Attempt:
    """One attempt.

    Attributes:
        number: the first is 1.
        from_step: it went on from there; 0 is the beginning.
        reached: the last step that one of its ranks has entered, or `from_step`.
        status: `finished`, `interrupted`, `failed`, `rewound` (the same process went on in the next attempt),
            `killed` (it has no end), or `running`: the one that this object began.
        error: of a failed one.
        ended_at: step that it said it ended at.
        facts: what it was begun with, `ranks` among it.
    """

    number: int
    from_step: int
    reached: int
    status: str
    error: str
    ended_at: int | None
    facts: Mapping[str, Any]


class Attempts:
    """`attempts.jsonl` of a run: one line for each beginning, and one for each end that was no kill."""

    def __init__(self, run: Path, guard: Guard = unguarded) -> None:
        self.path = run / "attempts.jsonl"
        self._run = run
        self._guard = guard
        self._current = 0

    def begin(self, from_step: int, **facts: Any) -> int:
        """Enter a new attempt; its number.

        Where this object has one that has not ended, its process goes back: it is entered as rewound.
        """
        before = self._entered()
        if before and before[-1].status == RUNNING:
            self.end(REWOUND, from_step)
        self._current = before[-1].number + 1 if before else 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"attempt": self._current, "event": "begin", "from_step": from_step, "time": now}
        append(self.path, line | {"pid": os.getpid(), "host": socket.gethostname()} | facts, self._guard)
        return self._current

    def end(self, status: str, step: int, error: str = "") -> None:
        """Enter how the attempt that this object began has ended; what is entered last holds."""
        assert self._current, "nothing was begun"
        line = {"attempt": self._current, "event": "end", "status": status, "step": step}
        append(self.path, line | {"error": error} if error else line, self._guard)

    def read(self) -> list[Attempt]:
        """All attempts, the first one first; none where the run has no file of them.

        Raises:
            CheckpointError: a line is not what was written.
        """
        return [self._with_reached(attempt) for attempt in self._entered()]

    def without_progress(self) -> tuple[int, int, str]:
        """How many of the newest attempts in a row crashed and did not get past one step; that step; the last error.

        Rewound attempts are no crashes: the process went on.
        """
        starts = [attempt for attempt in reversed(self._entered()) if attempt.status != REWOUND]
        crashed = list(map(self._with_reached, takewhile(lambda attempt: attempt.status in CRASHES, starts)))
        count, highest = 0, 0
        for index, attempt in enumerate(crashed, 1):
            if attempt.reached >= highest:
                count, highest = index, attempt.reached
        return count, highest, next((attempt.error for attempt in crashed[:count] if attempt.error), "")

    def _entered(self) -> list[Attempt]:
        """All attempts as the file has them: `reached` is yet to be read from the ledgers."""
        if not self.path.exists():
            return []
        found: list[Attempt] = []
        for number, record in read_lines(self.path):
            try:
                self._enter(found, record)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise changed(self.path, number, "it is no beginning or end of an attempt") from error
        return found

    def _enter(self, found: list[Attempt], record: Mapping[str, Any]) -> None:
        number, event = int(record["attempt"]), record["event"]
        if event == "end":
            status, error, step = str(record["status"]), str(record.get("error", "")), int(record["step"])
            found[number - 1] = replace(found[number - 1], status=status, error=error, ended_at=step)
        elif event == "begin" and number == len(found) + 1:
            facts = {key: value for key, value in record.items() if key not in ("attempt", "event", "from_step")}
            from_step, status = int(record["from_step"]), RUNNING if number == self._current else KILLED
            found.append(Attempt(number, from_step, from_step, status, "", None, facts))
        else:
            raise ValueError(record)

    def _with_reached(self, attempt: Attempt) -> Attempt:
        lines = [last_line(path) for path in ledgers(self._run, attempt.number).values()]
        steps = [line["step"] for line in lines if line and isinstance(line.get("step"), int)]
        return replace(attempt, reached=max([attempt.from_step, *steps]))


def ledger_folder(run: Path, attempt: int) -> Path:
    """Where the ranks of an attempt enter what they consume."""
    return run / "samples" / f"attempt_{attempt:04d}"


def ledgers(run: Path, attempt: int) -> dict[int, Path]:
    """The ledgers of an attempt by rank."""
    found = sorted(ledger_folder(run, attempt).glob(f"rank_{'[0-9]' * 5}.jsonl"))
    return {int(path.stem.removeprefix("rank_")): path for path in found}
