"""A matrix for a vocabulary out of the vectors of a source: copied, composed, or drawn like the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from toolkit.embeddings.table import Table
from toolkit.embeddings.targets import Target
from toolkit.embeddings.words import Piece
from toolkit.errors import ConfigError, DataError

KINDS = ("exact", "folded", "composed", "drawn", "special")
"""How a row came about."""
EXACT, FOLDED, COMPOSED, DRAWN, SPECIAL = range(len(KINDS))


@dataclass(frozen=True)
class Matrix:
    """A matrix of embeddings.

    Attributes:
        weights: (vocabulary, features) in fp32; the row of padding is zero.
        kinds: of each row, as in `KINDS`; (vocabulary,).
        facts: what is to be told of the way here; fit for JSON.
    """

    weights: torch.Tensor
    kinds: torch.Tensor
    facts: dict[str, Any]

    @property
    def found(self) -> torch.Tensor:
        """Which rows are of the source: (vocabulary,) bool."""
        return self.kinds < DRAWN


def transfer(target: Target, source: Table, *, folds: bool = True, composes: bool = True, seed: int = 0) -> Matrix:
    """A row for each piece of the target.

    That of the same text is copied; else, with `folds`, that of a text in other case or width; else, with `composes`,
    it is the mean over what the source cuts the piece into. The rest are drawn from a normal distribution with the mean
    and spread that those rows have, feature by feature (Hewitt 2021, "Initializing new word embeddings"). Special
    tokens have the row of the source's where it has one of that name, and are drawn otherwise; padding is zero.

    Raises:
        DataError: nothing of the target is in the source.
    """
    size, features = len(target.pieces), source.vectors.shape[1]
    weights, kinds = torch.zeros(size, features), torch.full((size,), DRAWN)
    for number, piece in enumerate(target.pieces):
        if not piece.text:
            kinds[number] = SPECIAL
            continue
        rows, kinds[number] = _rows(piece, source, folds, composes)
        if rows:
            weights[number] = source.vectors[list(rows)].mean(0)
    found = kinds < DRAWN
    if not bool(found.any()):
        raise DataError(
            f"not one of the {size:,} tokens of {target.name} has a vector in {source.name}",
            "Are they of the same language? A source of another script has nothing to give.",
        )
    generator = torch.Generator().manual_seed(seed)
    known = weights[found]
    mean, spread = known.mean(0), known.std(0, correction=0)
    rest = ~found
    weights[rest] = mean + spread * torch.randn(int(rest.sum()), features, generator=generator)
    if (padding := target.tokenizer.pad_token_id) is not None:
        weights[padding] = 0
    return Matrix(weights, kinds, {"source": source.name, **source.facts})


def reduced(matrix: Matrix, padding: int | None, dimension: int) -> Matrix:
    """The same in fewer features: the principal components of the rows that were found, around their mean.

    Raises:
        ConfigError: there are not so many features, or not so many rows.
    """
    found = matrix.weights[matrix.found]
    most = min(found.shape)
    if dimension >= most:
        raise ConfigError(
            f"--matrix.dimension {dimension} has no effect: {len(found):,} vectors of {found.shape[1]} features were "
            "found, which do not have more components",
            f"Use less than {most}, or leave it out.",
        )
    mean = found.mean(0)
    centred = (found - mean).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    components = vectors[:, -dimension:].flip(1).float()
    weights = (matrix.weights - mean) @ components
    if padding is not None:
        weights[padding] = 0
    kept = float(values[-dimension:].sum() / values.sum())
    return Matrix(weights, matrix.kinds, matrix.facts | {"variance_kept": kept})


def coverage(target: Target, matrix: Matrix) -> dict[str, Any]:
    """How many rows came about how, and where counts are known, which share of all occurrences they have."""
    rows = {name: int((matrix.kinds == kind).sum()) for kind, name in enumerate(KINDS)}
    told: dict[str, Any] = {"tokens": len(target.pieces), "by_kind": rows}
    if target.counts is not None and any(target.counts):
        counts = torch.tensor(target.counts, dtype=torch.float64)
        shares = {name: float(counts[matrix.kinds == kind].sum() / counts.sum()) for kind, name in enumerate(KINDS)}
        told["by_occurrence"] = shares
    return told


def nearest_words(target: Target, matrix: Matrix, words: Sequence[str], count: int = 5) -> dict[str, list[Any]]:
    """For each word those with the nearest vectors (by cosine) that were found, with their similarity.

    Raises:
        ConfigError: a word is not in the vocabulary.
    """
    rows = {piece.text: number for number, piece in reversed(list(enumerate(target.pieces))) if piece.text}
    if missing := [word for word in words if word not in rows]:
        raise ConfigError(
            f"--matrix.neighbours {' '.join(missing)}: not in the vocabulary of {target.name}", "Name others."
        )
    known = matrix.weights[matrix.found]
    centred = F.normalize(matrix.weights - known.mean(0), dim=1)  # all vectors of a model have much in common
    found = {}
    for word in words:
        near = centred @ centred[rows[word]]
        near[~matrix.found] = -2
        order = near.argsort(descending=True)[: 2 * count + 2].tolist()
        others = {target.pieces[at].text: float(near[at]) for at in reversed(order) if target.pieces[at].text != word}
        found[word] = sorted(others.items(), key=lambda entry: -entry[1])[:count]
    return found


def frequent_words(target: Target, matrix: Matrix, count: int = 6) -> list[str]:
    """Some words of two letters or more whose vectors were found: frequent ones, but for the most frequent."""
    order = range(len(target.pieces))
    if target.counts is not None:
        order = sorted(order, key=lambda at: -target.counts[at])  # type: ignore[assignment,index]
    kinds = matrix.kinds.tolist()
    words = [
        target.pieces[at].text
        for at in order
        if kinds[at] == EXACT and target.pieces[at].begins and _is_word(target.pieces[at])
    ]
    begin = min(100, len(words) // 10)
    return words[begin :: max(1, min(40, len(words) // (count + 1)))][:count]


def _is_word(piece: Piece) -> bool:
    return piece.text.isalpha() and len(piece.text) > (1 if not piece.text.isascii() else 3)


def _rows(piece: Piece, source: Table, folds: bool, composes: bool) -> tuple[Sequence[int], int]:
    if (row := source.find(piece)) is not None:
        return [row], EXACT
    if folds and (row := source.find_folded(piece)) is not None:
        return [row], FOLDED
    if composes and (rows := source.split(piece)):
        return rows, COMPOSED
    return [], DRAWN
