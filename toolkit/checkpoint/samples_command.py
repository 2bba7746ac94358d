"""The command `toolkit checkpoint samples`: the account of a run's samples, and whether it adds up."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich import box
from rich.table import Table

from toolkit.checkpoint.account import Account, Part, account
from toolkit.checkpoint.screen import plain, screen

SHOWN = 10
"""Samples that are named on the screen; JSON has more of them."""


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--json", action="store_true", help="print a JSON object, with the samples at fault")


def run(options: Namespace) -> int:
    """Show the account.

    Returns:
        0 where no sample was lost, seen twice or in a wrong step; 1 otherwise.
    """
    found = account(options.run.expanduser())
    if options.json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        _show(found)
    return 0 if found.sound else 1


def _show(found: Account) -> None:
    console = screen()
    console.print(_table(found.parts))
    console.print(f"\n{found.steps:,} steps, {found.epochs:,} whole epochs: {found.samples:,} samples were computed")
    for kind, count, named in (
        ("skipped", len(found.skipped), found.skipped),
        ("in flight", found.in_flight, []),
        ("lost", found.lost, found.lost_ids),
        ("duplicate", found.duplicate, found.duplicate_ids),
        ("misplaced", found.misplaced, found.misplaced_ids),
    ):
        console.print(f"  {kind:<9}  {count:,}{_named(named)}", soft_wrap=True)


def _table(parts: list[Part]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("attempt", "from step", "to step", "ranks"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ended", no_wrap=True)
    for part in parts:
        whole = part.ranks in (part.ledgers, None)
        ranks = f"{part.ledgers}" if whole else f"{part.ledgers} of {part.ranks}"
        ended = "killed, or still running" if part is parts[-1] and part.status == "killed" else part.status
        table.add_row(f"{part.attempt}", f"{part.from_step:,}", f"{part.to_step:,}", ranks, plain(ended))
    return table


def _named(samples: list[tuple[int, int]] | list[tuple[int, int, str]]) -> str:
    """`": 17 (epoch 0), 4 (epoch 2: too long) …"`, or nothing."""
    words = [
        f"{sample} (epoch {epoch}{''.join(f': {plain(word)}' for word in why)})" for epoch, sample, *why in samples
    ]
    more = " …" if len(words) > SHOWN else ""
    return f": {', '.join(words[:SHOWN])}{more}" if words else ""
