"""Numbers on a command line, for `argparse`: within bounds, or refused in a sentence that names them."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable


def whole(first: int = 0, last: int | None = None) -> Callable[[str], int]:
    """The `type` of an option that takes a whole number from `first` to `last`."""

    def parse(word: str) -> int:
        if not word.isdecimal() or int(word) < first or (last is not None and int(word) > last):
            raise ArgumentTypeError(f"{word!r} is not a whole number from {first} {_end(last)}")
        return int(word)

    return parse


def number(first: float = 0, last: float = math.inf) -> Callable[[str], float]:
    """The `type` of an option that takes a number from `first` to `last`."""

    def parse(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not first <= value <= last:
            raise ArgumentTypeError(f"{word!r} is not a number from {first:g} {_end(last)}")
        return value

    return parse


def _end(last: float | None) -> str:
    return "on" if last in (None, math.inf) else f"to {last:g}"
