"""Rows of a table that cannot be learnt from: refused where they are many, told where they are few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolkit.data.tables.reading import RawTable
from toolkit.errors import DataError

_SHOWN = 5


def refuse_many(raw: RawTable, faults: Mapping[int, str], most: int, remedy: str) -> None:
    """Raises DataError where more than `most` rows are unfit; `faults` says why, by their index."""
    if len(faults) > most:
        raise DataError(f"{len(faults):,} rows are unfit: {'; '.join(told(raw, faults))}", remedy)


def told(raw: RawTable, faults: Mapping[int, str]) -> list[str]:
    """The first of them, each with its file and row."""
    return [f"{raw.where(row)}: {why}" for row, why in list(faults.items())[:_SHOWN]]


def warnings_of(raw: RawTable, faults: Mapping[int, str]) -> list[str]:
    """One for all that are left out; none where there are none."""
    return [f"{len(faults):,} unfit rows are left out, the first being {told(raw, faults)[0]}"] if faults else []


def stages_of(raw: RawTable, faults: Mapping[int, str], dropped: Mapping[str, int]) -> list[dict[str, Any]]:
    """What each reason to drop rows was given and left, for the report."""
    stages, rows = [], raw.cells.num_rows
    for why, count in dropped.items():
        examples = told(raw, faults) if why == "unfit" else []
        stages.append({"stage": why, "in": rows, "out": rows - count, "examples": examples})
        rows -= count
    return stages
