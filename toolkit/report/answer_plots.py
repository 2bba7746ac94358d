"""Plots of the answers to a test of measurements: predicted against true, and how far apart they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from toolkit.report.plots import COLORS, Plot

_INK, _SERIES_1, _SERIES_2 = (COLORS[name][0] for name in ("--ink", "--series-1", "--series-2"))
_PALEST = 0.08
"""A single sample must be seen among thousands."""


def answer_plots(answers: Mapping[str, Any]) -> Iterable[Plot]:
    """Both, of what a task of measurements gives as its `answers`; none where there is nothing.

    Args:
        answers: `edges` (n + 1) of bins over the range of the target; `grid` (n, n), samples by true and predicted bin;
            `error` and `deviation` (n), mean and deviation of predicted less true, by predicted bin.
    """
    grid = np.asarray(answers.get("grid", []), np.float64)
    if not grid.sum():
        return
    edges = np.asarray(answers["edges"], np.float64)
    # Bins that are ever wider come from a logarithm, and so are the axes then.
    logarithmic = edges[0] > 0 and edges[-1] - edges[-2] > 4 * (edges[1] - edges[0])
    yield _predicted_against_true(grid, edges, logarithmic=logarithmic)
    yield _errors(grid.sum(0), edges, answers, logarithmic=logarithmic)


def _predicted_against_true(grid: Any, edges: Any, *, logarithmic: bool) -> Plot:
    figure, axes = _axes(4.6, logarithmic=logarithmic)
    for row, column in zip(*np.nonzero(grid), strict=True):
        share = grid[row, column] / grid.max()
        corner, width, height = (edges[row], edges[column]), np.diff(edges)[row], np.diff(edges)[column]
        square = np.array([corner, (corner[0] + width, corner[1]), (corner[0] + width, corner[1] + height),
                           (corner[0], corner[1] + height)])  # fmt: skip
        axes.fill(*square.T, color=_SERIES_1, alpha=_PALEST + (1 - _PALEST) * share**0.5, linewidth=0)
    axes.plot(edges[[0, -1]], edges[[0, -1]], color=_INK, linestyle="--", linewidth=1)
    axes.set(xlabel="true", ylabel="predicted", xlim=edges[[0, -1]], ylim=edges[[0, -1]])
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain())
        axes.yaxis.set_minor_formatter("")
    near = sum(np.trace(grid, offset) for offset in (-1, 0, 1))
    text = f"{grid.sum():,.0f} test samples by true and predicted value, in {len(grid)} bins each; "
    text += f"{near / grid.sum():.1%} are predicted in their own bin or beside it."
    return Plot("Predicted against true", text, figure)


def _errors(counts: Any, edges: Any, answers: Mapping[str, Any], *, logarithmic: bool) -> Plot:
    figure, axes = _axes(3.0, logarithmic=logarithmic)
    there = counts > 0
    at = np.sqrt(edges[1:] * edges[:-1]) if logarithmic else (edges[1:] + edges[:-1]) / 2
    mean, deviation = (np.asarray(answers[name], np.float64) for name in ("error", "deviation"))
    axes.axhline(0, color=_INK, linestyle="--", linewidth=1)
    axes.fill_between(
        at[there], (mean - deviation)[there], (mean + deviation)[there], color=_SERIES_1, alpha=0.2, linewidth=0
    )
    axes.plot(at[there], mean[there], "o-", color=_SERIES_2)
    axes.set(xlabel="predicted", ylabel="predicted − true")
    overall = float((mean * counts).sum() / counts.sum())
    text = "Residuals by what was predicted: their mean, and one deviation around it. "
    text += f"Over all samples the mean is {overall:.4g}."
    return Plot("Residuals", text, figure)


def _axes(height: float, *, logarithmic: bool) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, height), layout="constrained")
    axes = figure.add_subplot()
    if logarithmic:
        axes.set_xscale("log")
        # Mathematical text would be drawn as shapes; a plain number is read out and found by a search.
        axes.xaxis.set_major_formatter(_plain())
        axes.xaxis.set_minor_formatter("")
    return figure, axes


def _plain() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:,g}")
