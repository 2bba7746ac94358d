"""The scale on which a measurement is learnt, and the way back to its own units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from toolkit.data.tables.columns import Floats

_SKEWED = 1.0


@dataclass(frozen=True)
class TargetScale:
    """Transform, then bring to mean 0 and deviation 1.

    Attributes:
        transform: `log1p` is the logarithm of 1 + target.
        mean, deviation: of the transformed target, in training.
        low, high: bounds of what is learnt, in training. Answers stay within three times that range: a network in its
            first steps may be far off, and its exponential no number.
    """

    transform: Literal["none", "log1p"]
    mean: float
    deviation: float
    low: float
    high: float

    def learnt(self, target: torch.Tensor) -> torch.Tensor:
        """What is learnt of a target: any shape, in its own precision."""
        value = target.log1p() if self.transform == "log1p" else target
        return (value - self.mean) / self.deviation

    def units(self, learnt: torch.Tensor) -> torch.Tensor:
        """The target in its own units, in fp64, of what was learnt or predicted."""
        room = self.high - self.low
        value = learnt.double().clamp(self.low - room, self.high + room) * self.deviation + self.mean
        return value.expm1() if self.transform == "log1p" else value


def fit_scale(target: Floats, transform: Literal["auto", "none", "log1p"]) -> TargetScale:
    """By the targets of the training rows; `auto` takes the logarithm where it makes a skewed target less so.

    Raises:
        ValueError: a target has no logarithm, or all are the same; the message is the end of a sentence.
    """
    lowest = float(target.min())
    if transform == "log1p" and lowest <= -1:
        raise ValueError(f"{lowest:g} has no logarithm of 1 + target")
    if transform == "auto":
        skewed = lowest >= 0 and skewness(target) > _SKEWED
        transform = "log1p" if skewed and abs(skewness(np.log1p(target))) < skewness(target) else "none"
    value = np.log1p(target) if transform == "log1p" else target
    mean, deviation = float(value.mean()), float(value.std())
    if not deviation or not math.isfinite(deviation):
        raise ValueError(f"all of them are {target[0]:g}")
    learnt = (value - mean) / deviation
    return TargetScale(transform, mean, deviation, float(learnt.min()), float(learnt.max()))


def skewness(values: Floats) -> float:
    """The third standardised moment; 0 of values that are all the same."""
    centred = values - values.mean()
    variance = float((centred**2).mean())
    return float((centred**3).mean()) / variance**1.5 if variance else 0.0
