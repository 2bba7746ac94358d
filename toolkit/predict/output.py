"""Predictions on the screen and in files, window by window; and a bar beside them."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from toolkit.errors import DataError
from toolkit.predict.prediction import Prediction
from toolkit.report.console import PLAIN_WIDTH

TEXTS_FOR_A_BAR = 200

_LABEL_WIDTH = 30
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Sink(Protocol):
    """Writes a window in one piece, so that Ctrl-C finds it written or not."""

    def write(self, window: Sequence[Prediction]) -> None:
        """Write these, behind those before."""


class _JsonLines:
    def __init__(self, out: TextIO, top: int | None) -> None:
        self._out = out
        self._top = top
        self._ascii = not (out.encoding or "").lower().startswith("utf")

    def write(self, window: Sequence[Prediction]) -> None:
        self._out.write("".join(map(self._line, window)))
        self._out.flush()

    def _line(self, found: Prediction) -> str:
        scores = {label: _rounded(score) for label, score in found.top(self._top)}
        line = {"text": found.text, "label": found.label, "score": _rounded(found.score), "scores": scores}
        return json.dumps(line, ensure_ascii=self._ascii) + "\n"


class _Csv:
    def __init__(self, out: TextIO, top: int) -> None:
        self._out = out
        self._top = top
        more = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("label", "score")]
        self._write([["text", "label", "score", *more]])

    def write(self, window: Sequence[Prediction]) -> None:
        self._write([found.text, *self._cells(found)] for found in window)

    def _cells(self, found: Prediction) -> Iterator[str | float]:
        for label, score in found.top(self._top):
            yield from (label, _rounded(score))

    def _write(self, rows: Iterable[Sequence[str | float]]) -> None:
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows(rows)
        self._out.write(lines.getvalue())
        self._out.flush()


class _Table:
    """One table, however many windows it comes in: its widths are known from the labels and the screen."""

    def __init__(self, out: TextIO, top: int, labels: Sequence[str], total: int | None) -> None:
        if not (out.encoding or "utf-8").lower().startswith("utf") and hasattr(out, "reconfigure"):
            out.reconfigure(errors="replace")  # a character that the screen cannot show must not end the command
        self._out = out
        self._top = top
        self._total = total
        options: dict[str, Any] = {"file": out, "markup": False, "emoji": False, "highlight": False}
        if not out.isatty():
            options |= {"width": PLAIN_WIDTH, "force_terminal": False, "color_system": None}
        self._screen = RichConsole(**options)
        self._label_width = min(_LABEL_WIDTH, max(5, *(cell_len(_shown(label)) for label in labels)))
        self._room = max(10, self._screen.width - self._label_width - 12)
        self._begun = False

    def write(self, window: Sequence[Prediction]) -> None:
        texts = [_shown(found.text) for found in window]
        width = self._room
        if len(window) == self._total:
            width = min(width, max(4, *(cell_len(text) for text in texts)))
        table = Table(box=box.SIMPLE_HEAD, show_header=not self._begun, show_edge=False, pad_edge=False)
        table.add_column("text", width=width, no_wrap=True, overflow="ellipsis")
        table.add_column("label", width=self._label_width, no_wrap=True, overflow="ellipsis", style="bold")
        table.add_column("score", width=6, justify="right")
        for text, found in zip(texts, window, strict=True):
            pairs = found.top(self._top)
            labels = "\n".join(_shown(label) for label, _ in pairs)
            table.add_row(Text(text), Text(labels), "\n".join(f"{score:.4f}" for _, score in pairs))
        self._begun = True
        # Written by hand: rich has its own way with a pipe that was closed.
        with self._screen.capture() as captured:
            self._screen.print(table)
        self._out.write(captured.get())
        self._out.flush()


@contextmanager
def open_sink(
    file: Path | None, labels: Sequence[str], *, top: int | None, as_json: bool, total: int | None
) -> Iterator[Sink]:
    """Where the predictions go.

    Args:
        file: .csv or .jsonl; None for standard output.
        labels: all that the model has.
        top: how many of them to write for a text; None for one, in JSON all.
        as_json: whether standard output gets JSON lines, not a table.
        total: texts that there are, where that is known.

    Raises:
        DataError: the file cannot be written.
    """
    if not file:
        yield _JsonLines(sys.stdout, top) if as_json else _Table(sys.stdout, top or 1, labels, total)
        return
    try:
        with file.open("w", encoding="utf-8", newline="") as out:
            yield _Csv(out, top or 1) if file.suffix.lower() == ".csv" else _JsonLines(out, top)
    except OSError as error:
        raise DataError(
            f"--output {file} cannot be written: {error.strerror}", "Check its folder and the free space."
        ) from error


def progress_bar(total: int | None) -> Progress:
    """A bar on standard error, for many texts on a terminal; to be stopped while results go to the screen."""
    # Nobody knows how many texts will come through a pipe; while some are being typed, a bar is in the way.
    many = total > TEXTS_FOR_A_BAR if total is not None else not sys.stdin.isatty()
    bar = Progress(
        TextColumn("classifying"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=RichConsole(stderr=True),
        transient=True,
        disable=not (many and sys.stderr.isatty()),
    )
    bar.add_task("", total=total)
    return bar


def _rounded(score: float) -> float:
    """Six digits: as many as fp32 is good for."""
    return float(f"{score:.6g}")


def shown(text: str) -> str:
    """Without control codes, which must not reach the terminal."""
    return "\n".join(_CONTROL.sub("�", line) for line in text.split("\n"))


def _shown(text: str) -> str:
    """On one line too."""
    return shown(" ".join(text.split()))
