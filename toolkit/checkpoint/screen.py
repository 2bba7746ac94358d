"""How checkpoints look on a screen and in JSON, and the bar while they are read."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from toolkit.checkpoint.listing import Advance, Item, size_of

BYTES_FOR_A_BAR = 200_000_000

_WIDTH_OF_A_FILE = 120
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def facts(item: Item) -> dict[str, Any]:
    """What there is to say of a checkpoint, JSON-able."""
    found: dict[str, Any] = {
        "step": item.step,
        "path": str(item.path),
        "state": item.state,
        "reason": item.reason,
        "bytes": item.size,
    }
    if item.manifest is not None:
        found |= {key: item.manifest.get(key) for key in ("created", "attempt", "world", "metrics")}
    return found


def screen() -> Console:
    """For tables: with a width of its own off a terminal, where 80 columns would fold them."""
    width = None if sys.stdout.isatty() else _WIDTH_OF_A_FILE
    return Console(width=width, markup=False, emoji=False, highlight=False)


def show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The checkpoints, one a line: `facts` of each, with `newest` and `best`."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading, justify in (("step", "right"), ("saved", "left"), ("size", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for heading in ("written by", "state", "loss", "validation", ""):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        world, metrics = row.get("world") or {}, row.get("metrics") or {}
        by = f"{world.get('strategy')}, {count(world.get('ranks'), 'rank')}, {world.get('precision')}" if world else ""
        marks = ", ".join(mark for mark in ("newest", "best") if row[mark])
        figures = [_figure(metrics.get(name)) for name in ("loss", "validation_loss")]
        cells = [str(row["step"]), _when(row.get("created")), human_size(row["bytes"]), by, row["state"], *figures]
        table.add_row(*map(plain, [*cells, marks]))
    screen().print(table)


@contextmanager
def reading(folders: Sequence[Path]) -> Iterator[Advance]:
    """A bar on standard error while folders are read, where that takes long; to be told of the bytes."""
    with bar_of_bytes("reading", sum(map(size_of, folders))) as advance:
        yield advance


@contextmanager
def bar_of_bytes(doing: str, total: int) -> Iterator[Advance]:
    """A bar on standard error, where there is much to do; to be told of the bytes."""
    bar = Progress(
        TextColumn(doing),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
        disable=total < BYTES_FOR_A_BAR or not sys.stderr.isatty(),
    )
    task = bar.add_task("", total=total)
    with bar:
        yield lambda read: bar.advance(task, read)


def human_size(size: int) -> str:
    """As `5.2 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def count(number: Any, what: str) -> str:
    """As `1 file` or `3 files`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def plain(text: str) -> str:
    """Without control codes, which must not reach the terminal: manifests and names may come from elsewhere."""
    return _CONTROL.sub("�", text)


def _when(created: Any) -> str:
    with suppress(ValueError, TypeError, OverflowError):
        return datetime.fromisoformat(created).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return ""


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else ""
