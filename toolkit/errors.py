"""The one tree of user errors.

A `ToolkitError` is a mistake that its reader can mend: the message names the key, the file or the rank,
and `remedy` says what to do. `report_and_exit` shows it in one screen and leaves with exit code 2, so that a
traceback always means a defect of the toolkit.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

USER_ERROR_EXIT_CODE = 2
RESUMABLE_EXIT_CODE = 75
"""The run did not end, but can go on from its last checkpoint: a launcher may start it again."""


class ToolkitError(Exception):
    """What went wrong, and what to do about it.

    Args:
        message: the fact, with the key, file, row, rank or value at fault.
        remedy: one or more sentences that say how to go on.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.remedy}" if self.remedy else self.message


class ConfigError(ToolkitError):
    """A setting that is unknown, out of range, contradicts another one, or cannot take effect."""


class DataError(ToolkitError):
    """Data that is missing, unreadable or unfit for the task."""


class ModelError(ToolkitError):
    """A model or tokenizer that is missing, unreadable or unfit for the task."""


class CheckpointError(ToolkitError):
    """A run folder or checkpoint that is missing, damaged or belongs to another run."""


class LaunchError(ToolkitError):
    """Processes that were started in a way in which they cannot train together."""


class FencedError(LaunchError):
    """Another process has taken over the run: this one must write nothing more to its folder."""


class NumericsError(ToolkitError):
    """A loss or gradient that is not finite, with the step, the rank and the samples at fault."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the choice closest to `word`, or an empty string where none is close."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
