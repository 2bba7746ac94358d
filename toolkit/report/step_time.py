"""Where the time of a step goes, for screen and page: the rows of the table, and a bar of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

NAMES = {
    "compute": "computing",
    "padding": "computing on padding",
    "communication": "communication, not hidden",
    "waiting": "waiting for other ranks",
    "data": "waiting for data",
    "host": "Python, launching, logging",
    "checkpoint": "copying for checkpoints",
}
"""What the parts of report.json are called for a reader."""
_COLORS = ("--series-1", "--series-2", "--series-3", "--muted")


def step_time_rows(profile: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table; with the range over the ranks where there are several."""
    several = profile["ranks"] > 1
    header = ("part of a step", "ms", "share", *(("ms, by rank",) if several else ()))
    rows: list[tuple[str, ...]] = []
    for row in profile["parts"]:
        if row["most"] == 0:
            continue
        ranks = (f"{_ms(row['least'])} to {_ms(row['most'])}",) if several else ()
        rows.append((NAMES[row["part"]], _ms(row["seconds"]), f"{100 * row['share']:.1f} %", *ranks))
    return header, [*rows, ("a step", _ms(profile["seconds"]), "100.0 %", *(("",) if several else ()))]


def step_time_notes(profile: Mapping[str, Any]) -> list[str]:
    """The advice, and what the table does not say."""
    first, steps = profile["first_step"], profile["steps"]
    which = f"step {first}" if steps == 1 else f"steps {first} to {first + steps - 1}"
    notes = [profile["advice"]]
    hidden = _ms(profile["hidden_communication"])
    if hidden != _ms(0):
        notes.append(f"Another {hidden} ms of communication a step are hidden behind other parts.")
    if padding := profile["padding_of_tokens"]:
        notes.append(f"{100 * padding:.1f} % of the tokens computed are padding.")
    return [*notes, f"Measured in {which}; a trace for Perfetto of each rank is in {profile['traces']}."]


def step_time_bar(profile: Mapping[str, Any]) -> str:
    """A bar of HTML, as wide as a step, in which each part has its share, over the notes; names are its titles."""
    cells = []
    for number, row in enumerate(row for row in profile["parts"] if row["most"] > 0):
        title = escape(f"{NAMES[row['part']]}: {100 * row['share']:.1f} %")
        look = f"flex:{row['share']:.6f} 1 0;background:var({_COLORS[number % len(_COLORS)]})"
        cells.append(f'<div title="{title}" style="{look}"></div>')
    label = escape("; ".join(f"{NAMES[row['part']]} {100 * row['share']:.0f} %" for row in profile["parts"]))
    look = "display:flex;gap:1px;height:1.4rem;border-radius:.3rem;overflow:hidden;margin:.4rem 0 .8rem"
    notes = "".join(f"<p>{escape(note)}</p>" for note in step_time_notes(profile))
    return f'<div role="img" aria-label="{label}" style="{look}">{"".join(cells)}</div>{notes}'


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"
