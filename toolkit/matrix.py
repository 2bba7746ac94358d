"""The command `toolkit matrix`: which strategy goes with which quantization and adapter, and why the rest does not."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from toolkit.quantization import QUANTIZATIONS
from toolkit.report.console import PLAIN_WIDTH
from toolkit.strategies import STRATEGIES
from toolkit.strategies.support import ADAPTERS, REFUSALS, support

_PAGE = """# Support matrix

Which adapters each strategy trains, by the number format of the frozen base (`--quantization`). A cell that names an
adapter is tested: its losses, gradient norms and weights equal those of one process (DiLoCo, which does not promise
that, is tested by itself). All else is refused before anything is loaded, with the reason.

`toolkit matrix --markdown` makes this page; a test compares the two.

{table}

## Why a cell is refused

{reasons}
"""


def add_arguments(parser: ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--markdown", action="store_true", help="print the page of the documentation")


def run(arguments: Namespace) -> int:
    """`toolkit matrix`."""
    if arguments.markdown:
        print(markdown(), end="")
        return 0
    table = Table(*_HEADINGS, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for row in _rows(str):
        table.add_row(*row)
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    console.print(table)
    for line in _reasons(str):
        console.print(line)
    return 0


def markdown() -> str:
    """The page docs/support-matrix.md."""
    lines = [_HEADINGS, ["---"] * len(_HEADINGS), *_rows(_code)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return _PAGE.format(table=table, reasons="\n".join(f"- {line}" for line in _reasons(_code)))


_HEADINGS = ["strategy", *QUANTIZATIONS]


def _rows(name: Callable[[str], str]) -> list[list[str]]:
    return [[name(strategy), *(_adapters(strategy, low) for low in QUANTIZATIONS)] for strategy in STRATEGIES]


def _adapters(strategy: str, quantization: str) -> str:
    tested = [adapter for adapter in ADAPTERS if support(strategy, quantization, adapter).tested]
    return ", ".join(tested) or "refused"


def _reasons(name: Callable[[str], str]) -> list[str]:
    """One line for each refusal: whom it hits, why, and what to do."""
    lines = []
    for refusal in REFUSALS:
        strategies = "" if refusal.strategies == tuple(STRATEGIES) else " under " + _list(refusal.strategies, name)
        adapters = "" if refusal.adapters == ADAPTERS else " with adapter " + _list(refusal.adapters, name)
        lines.append(f"{_list(refusal.quantizations, name)}{strategies}{adapters}: {refusal.reason}. {refusal.remedy}")
    return lines


def _list(words: tuple[str, ...], name: Callable[[str], str]) -> str:
    return ", ".join(map(name, words))


def _code(word: str) -> str:
    return f"`{word}`"
