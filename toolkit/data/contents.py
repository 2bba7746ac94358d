"""What texts say: their words, in runs by which passages are known again, in every script."""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset, Features

from toolkit.data.mapping import map_texts

Grams = npt.NDArray[np.uint64]
Measure = Callable[[list[str]], dict[str, Any]]
"""Columns of what a batch of texts says; to be picklable."""

DENSE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Scripts without blanks between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters."""
_UNIT = re.compile(rf"[{DENSE}]|[^\W_{DENSE}]+")
_WORD, _CHARACTER = 5, 3
"""How much a word weighs, and a character of a dense script: 1,000 words of English are some 1,700 of Chinese."""
_BASE = 0x9E3779B97F4A7C15
_MODULUS = 2**64


@dataclass(frozen=True)
class Contents:
    """What all texts of a corpus say.

    Attributes:
        texts: one column, `text`.
        words: what a text says, without what is of its layout; picklable.
        processes: wish of the user, or None.
        scratch: folder for what is made on the way.
    """

    texts: Dataset
    words: Callable[[str], str]
    processes: int | None
    scratch: Path

    def measure(self, rows: npt.NDArray[np.int64], function: Measure, features: Features, title: str) -> Dataset:
        """The columns that `function` makes of some rows; `title` stands beside the progress bar, once in a corpus."""
        return map_texts(
            self.texts.select(rows),
            functools.partial(_measure, words=self.words, function=function),
            features,
            processes=self.processes,
            scratch=self.scratch,
            title=title,
        )


def _measure(texts: list[str], *, words: Callable[[str], str], function: Measure) -> dict[str, Any]:
    return function([words(text) for text in texts])


def split_words(text: str) -> list[str]:
    """The words of a text without case and punctuation, and of scripts without blanks the characters."""
    return _UNIT.findall(unicodedata.normalize("NFKC", text).casefold())


def grams(text: str, length: int, *, whole: bool = False) -> Grams:
    """64-bit hashes of all runs of `length` words, in their order.

    A word counts without case, and punctuation does not. Where words are not set apart by blanks, a run goes by
    characters and has 5/3 as many of them, which say as much as the words of English; so a length means the same in
    both, and in a text that mixes them.

    Args:
        text: in any script.
        length: in words.
        whole: take a text that is shorter for one run; otherwise it has none.
    """
    found = split_words(text)
    if not found:
        return np.empty(0, np.uint64)
    hashes, weights = zip(*map(_unit, found), strict=True)
    at = np.concatenate([[0], np.cumsum(weights)])
    ends = np.searchsorted(at, at[:-1] + length * _WORD)
    begins = np.flatnonzero(ends <= len(found))
    ends = ends[begins]
    if whole and not len(begins):
        begins, ends = np.array([0]), np.array([len(found)])
    # The hash of Rabin and Karp modulo 2^64: as the base is odd, a run can be moved back to where powers begin.
    powers, inverse = (_powers(base, len(found)) for base in (_BASE, pow(_BASE, -1, _MODULUS)))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(np.array(hashes, np.uint64) * powers, dtype=np.uint64)])
    result: Grams = (sums[ends] - sums[begins]) * inverse[begins]
    return result


@functools.lru_cache(maxsize=2**17)
def _unit(word: str) -> tuple[int, int]:
    """Hash and weight."""
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    dense = len(word) == 1 and re.match(f"[{DENSE}]", word)
    return int.from_bytes(digest, "little"), _CHARACTER if dense else _WORD


def _powers(base: int, count: int) -> Grams:
    steps = np.full(count, base, np.uint64)
    steps[0] = 1
    return np.cumprod(steps, dtype=np.uint64)
