"""Who holds the others up: the time that each rank needs for itself."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.watchdog import slow_ranks

STEPS_BETWEEN_LOOKS = 20
NOTICEABLE_SECONDS = 0.05
"""Of a step: less is noise."""


class Pace:
    """Compares what the ranks spent on their own, step by step."""

    def __init__(self) -> None:
        self._own = 0.0
        self._recent: list[Sequence[float]] = []
        self._busy = self._slowest = self._imbalance = 0.0
        self._steps = 0

    def add(self, seconds: float) -> None:
        """Note time that this rank has spent on its own, not waiting for others."""
        self._own += seconds

    def take(self) -> float:
        """This rank's seconds since the last time."""
        own, self._own = self._own, 0.0
        return own

    def note(self, seconds: Sequence[float], imbalance: float) -> list[tuple[int, float]]:
        """Enter the seconds of all ranks in one step, and by how much their work was planned to be apart.

        Returns:
            Every few steps the ranks that are far slower than the others, with their seconds a step.
        """
        self._recent.append(seconds)
        self._busy += sum(seconds) / len(seconds)
        self._slowest += max(seconds)
        self._imbalance += imbalance
        self._steps += 1
        if len(self._recent) < STEPS_BETWEEN_LOOKS:
            return []
        means = [sum(of_rank) / len(of_rank) for of_rank in zip(*self._recent, strict=True)]
        self._recent = []
        return [(rank, means[rank]) for rank in slow_ranks(means) if means[rank] > NOTICEABLE_SECONDS]

    def balance(self) -> dict[str, float]:
        """Means over the steps of this process's life.

        `imbalance`: by how much the dearest rank's tokens cost more than the mean. `waited`: the share of its time in
        data and forward that the average rank waited for the slowest one of each step.
        """
        return {
            "imbalance": self._imbalance / self._steps if self._steps else 0.0,
            "waited": 1 - self._busy / self._slowest if self._slowest else 0.0,
        }
