"""A mistake of the user, shown without a traceback. `toolkit.errors` needs a newer Python than login nodes have."""

from __future__ import annotations


class UserError(Exception):
    """What is wrong, and what to do about it.

    Args:
        message: the fact, with the option, file and line, or SLURM's own words.
        remedy: how to go on.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.remedy}" if self.remedy else self.message
