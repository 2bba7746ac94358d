"""Who holds the others up: the time that each rank needs for itself."""

from __future__ import annotations

import torch

from toolkit.watchdog import slow_ranks
from toolkit.world import World

STEPS_BETWEEN_LOOKS = 20
NOTICEABLE_SECONDS = 0.05
"""Of a step: less is noise."""


class Pace:
    """Adds up this rank's seconds, and compares them with those of the others now and then."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """Note time that this rank has spent on its own, not waiting for others."""
        self._seconds += seconds

    def slow_ranks(self, step: int) -> list[tuple[int, float]]:
        """Ranks far slower than the others, with their seconds a step; looked at every few steps. Collective."""
        if step % STEPS_BETWEEN_LOOKS or not self._world.connected:
            return []
        busy = torch.zeros(self._world.size)
        busy[self._world.rank] = self._seconds / STEPS_BETWEEN_LOOKS
        self._seconds = 0.0
        means: list[float] = self._world.sum(busy).tolist()
        return [(rank, means[rank]) for rank in slow_ranks(means) if means[rank] > NOTICEABLE_SECONDS]
