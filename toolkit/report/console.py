"""What a run shows on the screen: the plan, the progress, the final figures.

On a terminal this is coloured and redrawn in place; in a pipe or a log file it is plain lines, 100 columns wide,
without control codes. Only rank 0 speaks: every other rank makes a `Console(quiet=True)`.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple, Protocol, Self, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from toolkit.errors import ToolkitError
from toolkit.report.figures import figures_in

PLAIN_WIDTH = 100
SECONDS_BETWEEN_LINES = 10.0
_WIDE = 110
_LABELS_SHOWN = 20
_ERROR_LINES = 24
_BLOCKS = " ▁▂▃▄▅▆▇█"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ProgressReport(Protocol):
    """What `Console.progress` hands out."""

    def update(self, step: int, loss: float, samples_per_second: float, **more: float) -> None:
        """Show that `step` optimizer steps are done; `lr` and other figures of the step go in `more`."""


class Shown(NamedTuple):
    """A row of tokens to be shown: what it is, and its runs of tokens as (kind, text, number of tokens)."""

    title: str
    parts: Sequence[tuple[str, str, int]]


class Console:
    """The screen of one rank.

    Args:
        quiet: print nothing at all, errors included; for every rank but 0.
        out: where to write; standard output by default.
        err: where errors go; standard error by default.
    """

    def __init__(self, quiet: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.quiet = quiet
        self._out = _rich(out or sys.stdout)
        self._err = _rich(err or sys.stderr)
        self._bars: Progress | None = None
        self._evaluations: dict[str, TaskID] = {}

    @property
    def is_terminal(self) -> bool:
        """Whether lines can be redrawn in place."""
        return self._out.is_terminal

    def plan(self, rows: Mapping[str, Mapping[str, str]], learning_rates: Sequence[float]) -> None:
        """Show what is about to happen: section → {name: value}, and the learning rate of every step."""
        if self.quiet:
            return
        table = Table(box=box.SIMPLE_HEAD, show_header=False, show_edge=False, pad_edge=False, padding=(0, 1))
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for section, settings in rows.items():
            for i, (name, value) in enumerate(settings.items()):
                table.add_row(_clean(section) if i == 0 else "", _clean(name), _clean(value))
            table.add_section()
        self._out.print(table)
        self._out.print()
        if learning_rates:
            curve = "\n".join(learning_rate_plot(learning_rates, min(72, self._out.width - 14)))
            self._out.print(Text("learning rate", style="bold cyan"))
            self._out.print(Text(curve, style="cyan"), soft_wrap=True)
            self._out.print()

    def samples(self, samples: Sequence[Shown]) -> None:
        """Show samples as a model sees them; where there are no colours, what is learnt stands in ⟦brackets⟧."""
        if self.quiet:
            return
        styles = {"learnt": "bold green", "given": "", "padding": "dim"}
        if any(kind == "learnt" for sample in samples for kind, _, _ in sample.parts):
            legend = "learnt" if self._out.color_system else "⟦learnt⟧"
            self._out.print(Text.assemble((legend, styles["learnt"]), " and the rest is given; ▒ is padding\n"))
        for number, sample in enumerate(samples, start=1):
            counts = {kind: sum(size for name, _, size in sample.parts if name == kind) for kind in styles}
            told = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
            heading = f"{number}{f' · {_clean(sample.title)}' if sample.title else ''} · tokens: {told}"
            self._out.print(Text(heading, style="bold cyan"))
            text = Text()
            for kind, words, size in sample.parts:
                words = f"▒×{size}" if kind == "padding" else _clean(words)
                marked = kind == "learnt" and not self._out.color_system
                text.append(f"⟦{words}⟧" if marked else words, style=styles[kind])
            self._out.print(text, soft_wrap=False)
            self._out.print()

    def label_balance(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Show how many samples of each label every split holds: split → {label: samples}."""
        if self.quiet or not counts:
            return
        totals = {split: sum(labels.values()) for split, labels in counts.items()}
        table = Table(
            box=box.SIMPLE_HEAD, title="samples per label", title_justify="left", show_edge=False, pad_edge=False
        )
        table.add_column("label", overflow="ellipsis", no_wrap=True)
        for split, total in totals.items():
            table.add_column(f"{_clean(split)} ({total:,})", justify="right", no_wrap=True)
        names = _by_size(counts)
        for name in names[:_LABELS_SHOWN]:
            shares = (_count_and_share(counts[split].get(name, 0), totals[split]) for split in counts)
            table.add_row(_clean(name), *shares)
        self._out.print(table)
        if len(names) > _LABELS_SHOWN:
            self._out.print(f"… and {len(names) - _LABELS_SHOWN:,} more")
        self._out.print()

    @contextmanager
    def progress(self, total_steps: int, start: int = 0, log_every: int | None = None) -> Iterator[ProgressReport]:
        """Show the way from step `start` to `total_steps`.

        Args:
            total_steps: optimizer steps of the whole run.
            start: steps that an earlier process has done.
            log_every: off the terminal, print a line every so many steps; every 10 seconds by default.
        """
        if self.quiet:
            yield _Silence()
        elif not self.is_terminal:
            yield _Lines(self._out, total_steps, start, log_every)
        else:
            with _bars(self._out, transient=False) as bars:
                self._bars = bars
                task = bars.add_task("step", total=total_steps, completed=start, figures="")
                try:
                    yield _Bar(bars, task)
                finally:
                    self._bars = None
                    self._evaluations.clear()

    def evaluation(self, title: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of an evaluation are over; the bar goes away with the last one."""
        if self.quiet or not self.is_terminal:
            return
        if self._bars is None:
            self._bars = _bars(self._out, transient=True)
            self._bars.start()
        if title not in self._evaluations:
            self._evaluations[title] = self._bars.add_task(_clean(title), total=total, figures="")
        self._bars.update(self._evaluations[title], completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._evaluations.pop(title))
            if not self._bars.tasks:
                self.close()

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Show a table; its first column holds names, the others figures."""
        if self.quiet:
            return
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_edge=False, pad_edge=False)
        for place, heading in enumerate(header):
            table.add_column(heading, justify="right" if place else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(_clean, row))
        self._out.print(table)

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if not self.quiet:
            self._out.print(Text(_clean(text)))

    def warn(self, text: str) -> None:
        """Print a line that stands out, above the bar where there is one."""
        if not self.quiet:
            self._out.print(Text.assemble(("warning: ", "bold yellow"), _clean(text)))

    def summary(
        self,
        before: Mapping[str, float],
        after: Mapping[str, float],
        majority: float | None,
        extra: Mapping[str, str],
        next_command: str,
    ) -> None:
        """Show the figures of the held-out test, and how to go on.

        Args:
            before: the figures of the untrained model, by name; empty where it was not tested.
            after: the same of the trained model.
            majority: share of the most frequent label, which a constant answer would reach; None without labels.
            extra: further lines, such as the run's folder.
            next_command: the command that uses the model.
        """
        if self.quiet:
            return
        self.close()
        table = Table(box=box.SIMPLE_HEAD, title="held-out test", title_justify="left", show_edge=False, pad_edge=False)
        table.add_column("")
        for heading in ("before", "after", "change"):
            table.add_column(heading, justify="right")
        for figure in figures_in(before, after):
            if figure.better:
                change = _change(before.get(figure.key), after.get(figure.key), figure.better == "higher")
                table.add_row(figure.name, *change)
        if majority is not None:
            table.add_row("majority label", "", Text(f"{majority:.4f}", style="dim"), "")
        self._out.print(table)
        self._out.print()
        lines = Table.grid(padding=(0, 2))
        lines.add_column(style="dim", no_wrap=True)
        lines.add_column(overflow="fold")
        for name, text in extra.items():
            lines.add_row(_clean(name), _clean(text))
        self._out.print(lines)
        if next_command:
            # Never wrapped, so that it can be copied; on a line of its own, so that it is found.
            self._out.print(Text("\nnext:", style="dim"))
            self._out.print(Text("  " + _clean(next_command), style="bold"), soft_wrap=True)

    def error(self, error: ToolkitError) -> None:
        """Show an error and its remedy on standard error, in one screen."""
        if self.quiet:
            return
        self.close()
        parts = [Text(_first_lines(error.message, _ERROR_LINES))]
        if error.remedy:
            parts += [Text(), Text(_first_lines("→ " + error.remedy, _ERROR_LINES // 2), style="bold")]
        title = Text(type(error).__name__, style="bold red")
        self._err.print(Panel(Group(*parts), title=title, title_align="left", border_style="red", padding=(0, 1)))

    def close(self) -> None:
        """Take away a bar that an evaluation left, as one does that ends in an error."""
        if self._bars is not None:
            self._bars.stop()
        self._bars = None
        self._evaluations.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self.close()


def learning_rate_plot(rates: Sequence[float], width: int, height: int = 6) -> list[str]:
    """The learning rate over the steps as lines of text, `width` columns wide without the axis labels."""
    top = max(rates)
    columns = [_column_rate(rates, i, width) / top if top > 0 else 0.0 for i in range(width)]
    lines = []
    for row in range(height, 0, -1):
        label = f"{top:.3g}" if row == height else "0" if row == 1 else ""
        cells = "".join(_BLOCKS[max(0, min(8, round((share * height - row + 1) * 8)))] for share in columns)
        lines.append(f"{label:>9} {'┤' if label else '│'}{cells}".rstrip())
    peak = next(i for i, rate in enumerate(rates) if rate >= top * (1 - 1e-9))
    marks = {0: "step 1"}
    if peak > 0:
        marks[min(width - 1, peak * width // len(rates))] = f"warm-up ends at {peak + 1:,}"
    marks[width - 1] = f"{len(rates):,} (lr {rates[-1]:.3g})"
    axis = "".join("┬" if i in marks else "─" for i in range(width))
    return [*lines, f"{'':>9} └{axis}", *(f"{'':>11}{line}" for line in _captions(marks, width))]


def _captions(marks: Mapping[int, str], width: int) -> list[str]:
    """Each text under its column, on the first line that has room for it."""
    lines: list[str] = []
    for column, text in sorted(marks.items(), key=lambda mark: (mark[0] not in (0, width - 1), mark[0])):
        start = 0 if column == 0 else max(0, min(column - len(text) // 2, width - len(text)))
        for i, line in enumerate(lines):
            if not line.ljust(width)[max(0, start - 2) : start + len(text) + 2].strip():
                lines[i] = line.ljust(width)[:start] + text + line.ljust(width)[start + len(text) :]
                break
        else:
            lines.append(" " * start + text)
    return [line.rstrip() for line in lines]


def _column_rate(rates: Sequence[float], column: int, width: int) -> float:
    start = column * len(rates) // width
    return max(rates[start : max(start + 1, (column + 1) * len(rates) // width)])


class _Silence:
    def update(self, step: int, loss: float, samples_per_second: float, **more: float) -> None:
        pass


class _Bar:
    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def update(self, step: int, loss: float, samples_per_second: float, **more: float) -> None:
        # In a narrow window the count of the steps matters more than the lesser figures.
        shown = {name: more[name] for name in more if name == "lr" or self._bars.console.width >= _WIDE}
        self._bars.update(self._task, completed=step, figures=_figures(loss, samples_per_second, shown))


class _Lines:
    def __init__(self, out: RichConsole, total: int, start: int, log_every: int | None) -> None:
        self._out = out
        self._total = total
        self._start = start
        self._log_every = log_every
        self._begun = time.monotonic()
        self._printed = -math.inf

    def update(self, step: int, loss: float, samples_per_second: float, **more: float) -> None:
        now = time.monotonic()
        late = now - self._printed >= SECONDS_BETWEEN_LINES
        due = step % self._log_every == 0 if self._log_every else late
        if not due and step != self._total:
            return
        self._printed = now
        left = (now - self._begun) / max(1, step - self._start) * max(0, self._total - step)
        width = len(f"{self._total:,}")
        figures = _figures(loss, samples_per_second, more)
        # Wrapped lines are a nuisance to those who grep a log.
        line = f"step {step:>{width},}/{self._total:,}  {figures}  {_duration(left)} left"
        self._out.print(Text(line), soft_wrap=True)


def _rich(stream: TextIO) -> RichConsole:
    if not (stream.encoding or "utf-8").lower().startswith("utf") and hasattr(stream, "reconfigure"):
        # A label that the screen cannot show must not end a run.
        stream.reconfigure(errors="replace")
    if stream.isatty():
        return RichConsole(file=stream, markup=False, emoji=False, highlight=False)
    return RichConsole(
        file=stream,
        markup=False,
        emoji=False,
        highlight=False,
        width=PLAIN_WIDTH,
        force_terminal=False,
        color_system=None,
    )


def _bars(out: RichConsole, transient: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24 if out.width >= _WIDE else 10),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        console=out,
        transient=transient,
        speed_estimate_period=120,
    )


def _figures(loss: float, samples_per_second: float, more: Mapping[str, float]) -> str:
    others = (f"{_clean(name)} {value:.3g}" for name, value in more.items())
    return "  ".join([f"loss {loss:.4f}", *others, f"{samples_per_second:,.1f} samples/s"])


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _change(before: float | None, after: float | None, higher_is_better: bool) -> Iterable[Text]:
    yield Text("–" if before is None else f"{before:.4f}")
    yield Text("–" if after is None else f"{after:.4f}", style="bold")
    if before is None or after is None:
        yield Text("")
    else:
        better = (after > before) == higher_is_better
        yield Text(f"{after - before:+.4f}", style="green" if better else "" if after == before else "red")


def _by_size(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    totals: dict[str, int] = {}
    for labels in counts.values():
        for name, count in labels.items():
            totals[name] = totals.get(name, 0) + count
    return sorted(totals, key=lambda name: -totals[name])


def _count_and_share(count: int, total: int) -> str:
    return f"{count:,} {100 * count / total if total else 0:>5.1f} %"


def _first_lines(text: str, limit: int) -> str:
    lines = _clean(text).splitlines()
    return "\n".join(lines if len(lines) <= limit else [*lines[:limit], f"… and {len(lines) - limit} more lines"])


def _clean(text: object) -> str:
    """Texts come from data: a control code in one must not reach the terminal."""
    return _CONTROL.sub("�", str(text).expandtabs(4))
