"""Vectors that are there, by the words and pieces of words that they are of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from toolkit.embeddings.words import Piece, fold

Split = Callable[[Piece], Sequence[int]]
"""The rows of what a piece consists of; none where nothing is known of it."""


@dataclass
class Table:
    """A source of vectors.

    Attributes:
        vectors: (rows, features) in fp32.
        pieces: what each row is of.
        split: cuts what has no row of its own.
        name: what the source is, for people.
        facts: what is to be told of it; fit for JSON.
    """

    vectors: torch.Tensor
    pieces: Sequence[Piece]
    split: Split
    name: str
    facts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._exact: dict[tuple[str, bool], int] = {}
        self._folded: dict[tuple[str, bool], int] = {}
        for row, piece in enumerate(self.pieces):
            if piece.text:
                self._exact.setdefault((piece.text, piece.begins), row)
                self._folded.setdefault((fold(piece.text), piece.begins), row)

    def find(self, piece: Piece) -> int | None:
        """The row of the same text, at the same place of a word if there is one."""
        return _either(self._exact, piece.text, piece.begins)

    def find_folded(self, piece: Piece) -> int | None:
        """The row of a text that differs in nothing but case and width; the first of several."""
        return _either(self._folded, fold(piece.text), piece.begins)


def _either(rows: dict[tuple[str, bool], int], text: str, begins: bool) -> int | None:
    found = rows.get((text, begins))
    return rows.get((text, not begins)) if found is None else found
