"""What each stage of cleaning was given and left, with some of what it took out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from toolkit.data.clean import DROPPED, Roles

_EXAMPLES, _CHARACTERS = 3, 160


class Stages:
    """A list of stages, each compared with the one before.

    Args:
        texts: of all rows, in a column `text`.
        words: what a text says.
        malformed: what is wrong with rows that could not be read, and are none of these.
    """

    def __init__(self, texts: Dataset, words: Callable[[str], str] = str, malformed: Sequence[str] = ()) -> None:
        self._texts = texts
        self._words = words
        self._kept = np.ones(len(texts), np.bool_)
        self.facts: list[dict[str, Any]] = []
        if malformed:
            rows = {"in": len(texts) + len(malformed), "out": len(texts)}
            self.facts.append({"stage": "malformed", **rows, "examples": list(malformed[:_EXAMPLES])})

    def note(self, name: str, roles: Roles) -> None:
        """After a stage: the split of each row, or `DROPPED`."""
        kept = roles != DROPPED
        lost = np.flatnonzero(self._kept & ~kept)
        given, left = int(self._kept.sum()), int(kept.sum())
        self.facts.append({"stage": name, "in": given, "out": left, "examples": self._shown(lost[:_EXAMPLES].tolist())})
        self._kept = kept

    def _shown(self, rows: Sequence[int]) -> list[str]:
        texts = (self._texts[row]["text"] or "" for row in rows)
        return [" ".join(self._words(text).split())[:_CHARACTERS] if text else "" for text in texts]
