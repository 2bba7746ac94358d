"""To look at what a recipe would use without making it: what a check before a run does.

Within `looking`, data that are not prepared are not prepared, and no model is loaded: the recipe ends there, by an
exception. Outside of it both calls do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class NotPrepared(Exception):
    """Data that the recipe needs are not in the cache; its text is their fingerprint."""


class SeenEnough(Exception):
    """All that is to be looked at has been seen."""


_SEEN: ContextVar[list[str] | None] = ContextVar("seen", default=None)


@contextmanager
def looking() -> Iterator[list[str]]:
    """A list that fills with the fingerprints of the prepared data that were found."""
    seen: list[str] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def see(name: str, found: bool) -> None:
    """Prepared data are asked for.

    Raises:
        NotPrepared: this is a look, and they are not there.
    """
    seen = _SEEN.get()
    if seen is None:
        return
    if not found:
        raise NotPrepared(name)
    seen.append(name)


def stop_looking() -> None:
    """A model is asked for, which comes after the data.

    Raises:
        SeenEnough: this is a look.
    """
    if _SEEN.get() is not None:
        raise SeenEnough
