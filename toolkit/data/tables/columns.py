"""What the words of a column mean: numbers, dates, yes or no, or categories."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

Kind = Literal["numeric", "boolean", "date", "categorical", "left out"]
Floats = npt.NDArray[np.float64]

_YES_OR_NO = {"true": 1.0, "t": 1.0, "yes": 1.0, "y": 1.0, "false": 0.0, "f": 0.0, "no": 0.0, "n": 0.0}
_MOST = 0.95
"""A column is of a kind if so large a share of its words is; the others are faults."""
_FEW_ROWS = 50
_DATE_PARTS = ("year", "month", "day", "weekday", "hour", "days")


@dataclass(frozen=True)
class Coded:
    """A column as its different words.

    Attributes:
        words: without the white space around them.
        codes: of each row, an index into them; -1 where the cell is empty.
    """

    words: tuple[str, ...]
    codes: npt.NDArray[np.int32]

    def counts(self, rows: Any = slice(None)) -> npt.NDArray[np.int64]:
        """How often each word stands in these rows."""
        codes = self.codes[rows]
        return np.bincount(codes[codes >= 0], minlength=len(self.words)).astype(np.int64)


def code(column: Any, missing_values: Collection[str]) -> Coded:
    """The column of an Arrow table, of strings or nulls; what stands in `missing_values` is empty."""
    column = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column], pa.string())
    coded = pc.utf8_trim_whitespace(column).combine_chunks().dictionary_encode()
    words = coded.dictionary.to_pylist()
    present = [word for word in words if word not in missing_values]
    index = {word: number for number, word in enumerate(present)}
    of_word = np.array([index.get(word, -1) for word in words] + [-1], np.int32)
    codes = pc.fill_null(coded.indices, len(words)).to_numpy(zero_copy_only=False)
    return Coded(tuple(present), of_word[codes])


def parse(kind: Kind, words: Sequence[str]) -> Floats:
    """The numbers in words, (words, parts of the kind); NaN where one is no word of this kind."""
    width = len(parts(kind))
    return np.array([_PARSERS[kind](word) or (math.nan,) * width for word in words], np.float64).reshape(-1, width)


def parts(kind: Kind) -> tuple[str, ...]:
    """What is learnt of a column of this kind, behind its name; of categories no number is."""
    return _DATE_PARTS if kind == "date" else () if kind in ("categorical", "left out") else ("",)


def guess(words: Sequence[str], counts: npt.NDArray[np.int64]) -> tuple[Kind, str]:
    """The kind of a column by its words and how often each stands there, and why it is left out where it is."""
    rows = int(counts.sum())
    if not rows:
        return "left out", "empty"
    seen = [word for word, count in zip(words, counts, strict=True) if count]
    if all(word.lower() in _YES_OR_NO for word in seen):
        return "boolean", ""
    for kind in ("numeric", "date"):
        fit = [_PARSERS[kind](word) is not None for word in words]
        if counts[fit].sum() >= _MOST * rows:
            return kind, ""
    if rows >= _FEW_ROWS and len(seen) > rows / 2:
        return "left out", "another word in almost every row"
    return "categorical", ""


def what(kind: Kind) -> str:
    """How a word of this kind is called."""
    return {"numeric": "a number", "date": "a date", "boolean": "yes or no"}.get(kind, "a category")


def _number(word: str) -> tuple[float, ...] | None:
    try:
        value = float(word)
    except ValueError:
        return None
    # Python's own spelling of numbers, as 1_000, is none of tables.
    return (value,) if math.isfinite(value) and "_" not in word else None


def _boolean(word: str) -> tuple[float, ...] | None:
    value = _YES_OR_NO.get(word.lower(), {"1": 1.0, "0": 0.0}.get(word))
    return None if value is None else (value,)


def _date(word: str) -> tuple[float, ...] | None:
    try:
        moment = datetime.fromisoformat(word.replace("/", "-"))
    except ValueError:
        return None
    moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    days = (moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() / 86_400
    hour = moment.hour + moment.minute / 60
    return (moment.year, moment.month, moment.day, moment.weekday(), hour, days)


_PARSERS: Mapping[str, Callable[[str], tuple[float, ...] | None]] = {
    "numeric": _number,
    "boolean": _boolean,
    "date": _date,
    "categorical": lambda word: (),
    "left out": lambda word: (),
}
