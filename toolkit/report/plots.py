"""The plots of a run's page, as SVG that takes its colours and fonts from the page.

matplotlib is used through its objects alone: no pyplot, whose global state would meddle with a notebook's. Colours
are drawn as the light ones of `COLORS` and then turned into CSS variables, so that the page's dark mode recolours
the plots; text stays text, so that the reader's own fonts show what matplotlib's cannot (Chinese labels).
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from toolkit.report.figures import FIGURES

COLORS = {
    "--ink": ("#1b2330", "#e6e9ef"),
    "--muted": ("#5d6776", "#9aa4b2"),
    "--line": ("#dfe3e9", "#2e3744"),
    "--surface": ("#fefefe", "#171d26"),
    "--series-1": ("#2a6fdb", "#6aa5ff"),
    "--series-2": ("#d9730d", "#f0a04b"),
    "--series-3": ("#0b8f7a", "#3cc7ae"),
    "--on-series-1": ("#fdfdfe", "#0c1118"),
}
"""CSS variable → its colour on a light and on a dark page."""

ANNOTATED_CLASSES = 20
SHOWN_CLASSES = 60
SHOWN_LABELS = 25
_MARKS = "osd^v"
_POINTS = 1500
_LABEL_CELLS = 22
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

_INK, _MUTED, _LINE, _SURFACE, *_SERIES, _ON_SERIES = (light for light, _ in COLORS.values())
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": _INK,
    # A label may hold dollar signs.
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=_SERIES),
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plot:
    """One picture: its title, what it says in a sentence, and the figure, to be saved within `plot_style`."""

    title: str
    text: str
    figure: Figure
    wide: bool = False
    """Needs the width of the page, or is scrolled on a phone."""


@contextmanager
def plot_style() -> Iterator[None]:
    """matplotlib's settings as the plots need them, while they are drawn and saved."""
    with matplotlib.rc_context():
        # The user's own matplotlibrc might want LaTeX.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def clean(text: object) -> str:
    """`text` without the characters that XML cannot hold."""
    return _CONTROL.sub("�", str(text))


def loss_plot(metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Loss of each step, its moving average, and the loss of the evaluations."""
    steps, loss = _series(metrics, "loss")
    if not len(steps):
        return None
    smooth = moving_average(loss)
    figure, axes = _figure()
    axes.plot(*_thin(steps, loss), color=_SERIES[0], alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(*_thin(steps, smooth), color=_SERIES[0], label="moving average")
    at, validation = _series(evaluations, "loss")
    if len(at):
        axes.plot(at, validation, _marks("o", at), color=_SERIES[1], label="validation")
    _steps_axis(axes)
    axes.legend()
    text = f"Loss of {len(steps):,} optimizer steps; its moving average goes from {smooth[0]:.4g} to {smooth[-1]:.4g}."
    return Plot("Loss", text, figure)


def learning_rate_plot(metrics: Sequence[Mapping[str, Any]], planned: Sequence[float]) -> Plot | None:
    """Learning rate of each step, and what was planned for those that did not come."""
    steps, rates = _series(metrics, "lr")
    if not len(steps) and not planned:
        return None
    figure, axes = _figure()
    if len(planned) > (steps[-1] if len(steps) else 0):
        whole = np.arange(1, len(planned) + 1, dtype=np.float64)
        axes.plot(*_thin(whole, np.asarray(planned, dtype=np.float64)), "--", color=_MUTED, label="planned")
    if len(steps):
        axes.plot(*_thin(steps, rates), label="taken")
    _steps_axis(axes)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    if len(axes.lines) > 1:
        axes.legend()
    top = np.nanmax([*rates, *planned])
    text = f"Learning rate of each optimizer step; the highest is {top:.3g}."
    return Plot("Learning rate", text, figure)


def gradient_norm_plot(metrics: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Norm of the gradient of each step."""
    return _one_figure(metrics, "grad_norm", "Gradient norm", "Norm of the gradient before clipping")


def throughput_plot(metrics: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Samples a second of each step."""
    return _one_figure(metrics, "samples_per_second", "Throughput", "Samples per second of all ranks together")


def loss_scale_plot(metrics: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Loss scale of each step (fp16), with a mark where a step was skipped because its gradient overflowed."""
    steps, scale = _series(metrics, "loss_scale")
    if not len(steps):
        return None
    skipped = [line for line in metrics if line.get("skipped")]
    figure, axes = _figure()
    axes.step(*_thin(steps, scale), where="post", label="loss scale")
    if skipped:
        axes.plot(*_series(skipped, "loss_scale"), "x", color=_SERIES[1], label="step skipped")
        axes.legend()
    axes.set_yscale("log", base=2)
    # Mathematical text would be drawn as shapes; a plain number is read out and found by a search.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.minorticks_off()
    _steps_axis(axes)
    text = f"Loss scale of each optimizer step; {len(skipped):,} steps were skipped."
    return Plot("Loss scale", text, figure)


def evaluation_plot(evaluations: Sequence[Mapping[str, Any]], majority: float | None) -> Plot | None:
    """Shares of what is right in the evaluations, against the share of the most frequent label."""
    shares = [figure for figure in FIGURES if figure.share]
    found = [(figure.name, *_series(evaluations, figure.key)) for figure in shares]
    found = [curve for curve in found if len(curve[1])]
    if not found:
        return None
    figure, axes = _figure()
    for (name, steps, values), shape in zip(found, itertools.cycle(_MARKS), strict=False):
        axes.plot(steps, values, _marks(shape, steps), label=name)
    if majority is not None:
        axes.axhline(majority, color=_MUTED, linestyle="--", linewidth=1, label="majority label")
    _steps_axis(axes)
    axes.yaxis.set_major_formatter(_percent())
    axes.legend()
    last = ", ".join(f"{name} {values[-1]:.4f}" for name, _, values in found)
    text = f"Figures of {len(found[0][1])} evaluations on the validation split; the last: {last}."
    return Plot("Validation", text, figure)


def confusion_plot(confusion: Sequence[Sequence[float]], labels: Sequence[str]) -> Plot | None:
    """Confusion matrix: rows are true labels, columns predicted ones, the colour is the share of the row."""
    matrix = np.asarray(confusion, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape != (len(labels), len(labels)) or not len(labels):
        return None
    text = f"Test samples by true label (row) and predicted label (column): {np.trace(matrix):,.0f} of "
    text += f"{matrix.sum():,.0f} on the diagonal. The colour is the share of the row."
    if len(labels) > SHOWN_CLASSES:
        kept = np.sort(np.argsort(-matrix.sum(axis=1), kind="stable")[:SHOWN_CLASSES])
        matrix, labels = matrix[np.ix_(kept, kept)], [labels[i] for i in kept]
        text += f" Only the {SHOWN_CLASSES} most frequent labels are shown."
    n = len(labels)
    cell = 0.42 if n <= ANNOTATED_CLASSES else 0.16
    names = [shorten(label) for label in labels]
    margin = 0.5 + max(_inches(name) for name in names)
    side = max(2.2, cell * n)
    whole = side + margin + 0.1
    figure, axes = _figure(whole, whole)
    _place(figure, axes, left=margin, bottom=margin, right=0.1, top=0.1)
    _confusion_cells(axes, matrix, annotate=n <= ANNOTATED_CLASSES)
    axes.set(xlim=(0, n), ylim=(n, 0), xlabel="predicted", ylabel="true")
    axes.set_xticks(np.arange(n) + 0.5, names, rotation=90, ha="right", va="center", rotation_mode="anchor")
    axes.set_yticks(np.arange(n) + 0.5, names)
    _label_axes(axes)
    return Plot("Confusion matrix", text, figure, wide=n > 8)


def label_plot(counts: Mapping[str, Mapping[str, int]]) -> Plot | None:
    """Share of each label in every split."""
    totals = {split: sum(labels.values()) for split, labels in counts.items()}
    totals = {split: total for split, total in totals.items() if total}
    if not totals:
        return None
    size: dict[str, int] = {}
    for split in totals:
        for label, count in counts[split].items():
            size[label] = size.get(label, 0) + count
    labels = sorted(size, key=lambda label: -size[label])[:SHOWN_LABELS]
    names = [shorten(label) for label in labels]
    height = 0.8 + 0.3 * max(4, len(labels))
    margin = 0.15 + max(_inches(name) for name in names)
    figure, axes = _figure(5.4, height)
    _place(figure, axes, left=margin, bottom=0.35, right=0.2, top=0.4)
    bar = 0.8 / len(totals)
    for i, (split, total) in enumerate(totals.items()):
        shares = [counts[split].get(label, 0) / total for label in labels]
        offset = (i - (len(totals) - 1) / 2) * bar
        name = f"{shorten(split)} ({total:,})"
        axes.barh(np.arange(len(labels)) + offset, shares, bar * 0.88, color=_SERIES[i % len(_SERIES)], label=name)
    axes.set_yticks(np.arange(len(labels)), names)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(_percent())
    axes.grid(axis="y", visible=False)
    _label_axes(axes, x=False)
    figure.legend(loc="upper left", ncols=len(totals), borderaxespad=0.2)
    shown = (
        f"the {len(labels)} most frequent of {len(size):,} labels"
        if len(size) > len(labels)
        else f"{len(labels)} labels"
    )
    text = f"Share of {shown} in every split."
    return Plot("Labels", text, figure)


def length_plot(
    lengths: Mapping[str, Mapping[str, Sequence[float]]],
    max_length: int | None,
    truncated: Mapping[str, float],
    *,
    unit: str = "tokens",
) -> Plot | None:
    """Histogram of the lengths, in tokens or another unit, of every split, where they are cut, and how many are."""
    found = {
        split: (np.asarray(histogram.get("edges", []), float), np.asarray(histogram.get("counts", []), float))
        for split, histogram in lengths.items()
    }
    found = {split: (e, c) for split, (e, c) in found.items() if len(e) == len(c) + 1 > 1 and c.sum() > 0}
    if not found:
        return None
    figure, axes = _figure()
    for i, (split, (edges, counts)) in enumerate(found.items()):
        color = _SERIES[i % len(_SERIES)]
        axes.stairs(counts / counts.sum(), edges, color=color, linewidth=1.5, label=shorten(split))
    if max_length:
        axes.axvline(max_length, color=_INK, linestyle="--", linewidth=1, label=f"max_length {max_length:,}")
    axes.set_xlabel(unit)
    axes.yaxis.set_major_formatter(_percent())
    axes.legend()
    text = f"Share of the samples by length in {unit}, for every split."
    cut = ", ".join(f"{100 * share:.1f} % of {split}" for split, share in truncated.items() if share is not None)
    text += f" Cut at {max_length:,} {unit}: {cut}." if max_length and cut else ""
    return Plot("Lengths", text, figure)


def moving_average(values: Array, window: int | None = None) -> Array:
    """Exponential moving average over about `window` steps, unbiased at the start; NaN is passed over."""
    decay = 1 - 1 / (window or max(5, len(values) // 30))
    total = weight = 0.0
    smooth = np.empty(len(values))
    for i, value in enumerate(values):
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        smooth[i] = total / weight if weight else math.nan
    return smooth


def shorten(text: object, cells: int = _LABEL_CELLS) -> str:
    """`text` cut to so many columns; a wide character takes two."""
    words = " ".join(clean(text).split())
    if _cells(words) <= cells:
        return words
    kept = ""
    for character in words:
        if _cells(kept + character) > cells - 1:
            break
        kept += character
    return kept + "…"


def _figure(width: float = 5.4, height: float = 3.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _place(figure: Figure, axes: Axes, *, left: float, bottom: float, right: float, top: float) -> None:
    """Margins in inches, instead of those that matplotlib measures: it cannot measure labels in a font it lacks."""
    figure.set_layout_engine("none")
    width, height = figure.get_size_inches()
    axes.set_position((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))


def _one_figure(metrics: Sequence[Mapping[str, Any]], key: str, title: str, what: str) -> Plot | None:
    steps, values = _series(metrics, key)
    if not len(steps):
        return None
    smooth = moving_average(values)
    figure, axes = _figure()
    axes.plot(*_thin(steps, values), alpha=0.3, linewidth=0.8, color=_SERIES[0])
    axes.plot(*_thin(steps, smooth), color=_SERIES[0])
    _steps_axis(axes)
    middle = float(np.nanmedian(values))
    if middle > 0 and np.nanmin(values) > 0 and np.nanmax(values) > 50 * middle:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
    text = f"{what} at each optimizer step and its moving average; the median is {middle:.4g}."
    return Plot(title, text, figure)


def _series(lines: Iterable[Mapping[str, Any]], key: str) -> tuple[Array, Array]:
    points = [(line["step"], line[key]) for line in lines if line.get("step") is not None and key in line]
    table = np.array([(float(x), math.nan if y is None else float(y)) for x, y in points]).reshape(-1, 2)
    return (table[:, 0], table[:, 1]) if np.isfinite(table[:, 1]).any() else (np.empty(0), np.empty(0))


def _thin(steps: Array, values: Array) -> tuple[Array, Array]:
    """Lowest and highest value of each stretch of steps, so that a long run's page stays small and its spikes stay."""
    if len(steps) <= _POINTS:
        return steps, values
    kept: list[int] = []
    for part in np.array_split(np.arange(len(steps)), _POINTS // 2):
        finite = part[np.isfinite(values[part])]
        if len(finite):
            kept += sorted({int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])})
    return steps[kept], values[kept]


def _steps_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.margins(x=0.02)


def _marks(shape: str, steps: Array) -> str:
    return f"{shape}-" if len(steps) <= 60 else "-"


def _percent() -> FuncFormatter:
    return FuncFormatter(lambda share, _: f"{100 * share:g} %")


def _label_axes(axes: Axes, x: bool = True) -> None:
    axes.tick_params(axis="both", length=0)
    for tick in [*(axes.get_xticklabels() if x else []), *axes.get_yticklabels()]:
        tick.set_color(_INK)


def _confusion_cells(axes: Axes, matrix: Array, annotate: bool) -> None:
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros_like(matrix), where=totals > 0)
    axes.grid(visible=False)
    for row, column in zip(*np.nonzero(matrix), strict=True):
        share = shares[row, column]
        # A single mistake must be seen among hundreds of samples, hence no cell is paler than this.
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=_SERIES[0], alpha=max(0.06, share), linewidth=0))
        if annotate:
            color = _ON_SERIES if share > 0.5 else _INK
            count = f"{matrix[row, column]:,.0f}"
            axes.text(column + 0.5, row + 0.5, count, ha="center", va="center", color=color, fontsize=8)


def _cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _inches(text: str) -> float:
    """Room for a label: matplotlib cannot measure what its own font does not hold."""
    return _cells(text) * 0.072
