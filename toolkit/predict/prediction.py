"""The answer to one text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice


@dataclass(frozen=True)
class Prediction:
    """What the model says of one text.

    Attributes:
        text: as it was given.
        scores: probability of each label, the most likely first; of a model that gives a number, that.
        pair: the second text of a pair.
    """

    text: str
    scores: Mapping[str, float]
    pair: str | None = None

    @property
    def label(self) -> str:
        """The most likely label."""
        return next(iter(self.scores))

    @property
    def score(self) -> float:
        """Its probability."""
        return self.scores[self.label]

    def top(self, count: int | None) -> list[tuple[str, float]]:
        """The `count` most likely labels (all of them for None) with their probabilities."""
        return list(islice(self.scores.items(), count))
