"""Losses that must not be learnt from: not finite, or far above those before.

The loss of a step is one number on all ranks, so they come to one decision without asking each other.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

WINDOW = 100
"""Losses that a new one is compared with."""
ENOUGH = 20
"""Losses before there is anything to compare with."""
NORMAL = 1.4826
"""Median absolute deviations in a standard deviation of a normal distribution (Rousseeuw & Croux 1993)."""


class LossGuard:
    """Refuses a loss that is not finite and, with a threshold, one that is a spike.

    Args:
        threshold: robust standard deviations above the median of the last losses; None takes nothing for a spike.
        recent: losses to begin with.
    """

    def __init__(self, threshold: float | None = None, recent: Sequence[float] = ()) -> None:
        self.threshold = threshold
        self._recent = deque(recent, maxlen=WINDOW)

    @property
    def recent(self) -> list[float]:
        """The losses that the next one is compared with, the oldest first."""
        return list(self._recent)

    def refuse(self, loss: float) -> str:
        """Why this loss must not be applied, or an empty text; it is then one of those to compare with."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.threshold is not None and len(self._recent) >= ENOUGH:
            median = statistics.median(self._recent)
            # Losses that are all alike deviate by rounding alone: a hundredth of their size is no spike.
            deviation = max(NORMAL * statistics.median(abs(x - median) for x in self._recent), abs(median) / 100)
            if loss > median + self.threshold * deviation:
                above = (loss - median) / deviation
                return f"the loss is a spike: {loss:.4g}, {above:.1f} robust deviations above {median:.4g}"
        self._recent.append(loss)
        return ""
