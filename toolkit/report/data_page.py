"""A page about data: what each stage of cleaning took out, what is in the splits, and how long it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.report import plots
from toolkit.report.elements import bullets, card, escaped, figure, grid, page, section, table
from toolkit.report.plots import Plot


def write_data_page(facts: Mapping[str, Any], file: Path, title: str) -> None:
    """Write the page.

    Args:
        facts: `sources`, `stages`, `counts` by split, `lengths` by split (edges and counts, in characters), `warnings`,
            and, where there are classes, `labels` (split → class → rows).
        file: to write to.
        title: of the page.
    """
    with plots.plot_style():
        found = (
            plots.label_plot(facts.get("labels") or {}),
            plots.length_plot(facts["lengths"], None, {}, unit="characters"),
        )
        body = "".join(
            (
                f"<h1>{escaped(title)}</h1>\n<p>{escaped(', '.join(facts['sources']))}</p>\n",
                section("Warnings", bullets(facts["warnings"])),
                section("Cleaning", grid(stage_cards(facts["stages"]))),
                section("Splits", card(table("", ("split", "rows"), list(facts["counts"].items()), numbers=1))),
                section("Rows", grid(map(figure, _there(found)))),
            )
        )
    file.write_text(page(title, body), encoding="utf-8")


def stage_cards(stages: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """A table of the stages, and what some of them took out."""
    if not stages:
        return
    rows = [(stage["stage"], stage["in"], stage["out"], stage["in"] - stage["out"]) for stage in stages]
    yield card(table("Rows after each stage", ("stage", "in", "out", "dropped"), rows, numbers=3))
    examples = [(stage["stage"], example) for stage in stages for example in stage["examples"]]
    if examples:
        yield card(table("Some of what was dropped", ("stage", "text"), examples))


def _there(found: Iterable[Plot | None]) -> Iterable[Plot]:
    return filter(None, found)
