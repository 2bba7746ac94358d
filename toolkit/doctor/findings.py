"""Findings: what is wrong (or well), where, why it matters, and how to mend it."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from toolkit.report.console import PLAIN_WIDTH

Severity = Literal["ok", "warning", "error"]
_ORDER: tuple[Severity, ...] = ("error", "warning", "ok")
_SIGNS = {"error": ("✗", "bold red"), "warning": ("!", "bold yellow"), "ok": ("✓", "green")}


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    Attributes:
        severity: an `error` stops a job or spoils it; a `warning` may slow it; `ok` is as it should be.
        check: what was looked at, in a word or two.
        what: the fact, with its figures.
        where: the node, or the link between two; empty for all of them together.
        why: why that matters.
        mend: what to do.
    """

    severity: Severity
    check: str
    what: str
    where: str = ""
    why: str = ""
    mend: str = ""

    @staticmethod
    def read(value: Mapping[str, Any]) -> Finding:
        """The finding that `dataclasses.asdict` has made plain."""
        return Finding(**value)


def ok(check: str, what: str, where: str = "") -> Finding:
    """Something is as it should be."""
    return Finding("ok", check, what, where)


def verdict(findings: Sequence[Finding]) -> Severity:
    """The gravest of the severities."""
    return next((kind for kind in _ORDER if any(f.severity == kind for f in findings)), "ok")


def merged(findings: Sequence[Finding]) -> list[Finding]:
    """In order of gravity; what is said alike of several places stands once, with all of them."""
    places: dict[Finding, list[str]] = {}
    for finding in findings:
        places.setdefault(dataclasses.replace(finding, where=""), []).append(finding.where)
    joined = [dataclasses.replace(f, where=", ".join(dict.fromkeys(filter(None, at)))) for f, at in places.items()]
    return sorted(joined, key=lambda finding: _ORDER.index(finding.severity))


def as_json(findings: Sequence[Finding], nodes: Sequence[str], seconds: float, figures: Mapping[str, Any]) -> str:
    """All of it for a machine: `verdict`, `nodes`, `seconds`, `findings` and what was measured as `figures`."""
    content = {
        "verdict": verdict(findings),
        "nodes": list(nodes),
        "seconds": round(seconds, 2),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "figures": dict(figures),
    }
    return json.dumps(content, ensure_ascii=False, indent=2)


def show(findings: Sequence[Finding], nodes: Sequence[str], seconds: float) -> None:
    """All of it for a reader, the gravest last, where the eye is."""
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    screen = Console(width=width, markup=False, emoji=False, highlight=False)
    column = max((len(finding.check) for finding in findings), default=0)
    for finding in sorted(findings, key=lambda finding: -_ORDER.index(finding.severity)):
        sign, style = _SIGNS[finding.severity]
        place = f"{finding.where}: " if finding.where else ""
        screen.print(_hanging((f"{sign} {finding.check:<{column}}  ", style), (place + finding.what, ""), screen.width))
        for text, look in ((f"why: {finding.why}", "dim"), (f"→ {finding.mend}", "cyan")):
            if not text.endswith((": ", "→ ")):
                screen.print(_hanging((" " * (column + 4), ""), (text, look), screen.width))
    counts = {kind: sum(finding.severity == kind for finding in findings) for kind in _ORDER}
    told = ", ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts.items() if kind != "ok")
    screen.print(Text(f"\n{len(nodes)} node{'s' * (len(nodes) != 1)}, {seconds:.1f} s: {told}"))


def _hanging(head: tuple[str, str], text: tuple[str, str], width: int) -> Text:
    """A line whose continuation stands below its text; both as (words, style)."""
    indent = len(head[0])
    lines = textwrap.wrap(text[0], max(20, width - indent), break_on_hyphens=False) or [""]
    return Text.assemble(head, (("\n" + " " * indent).join(lines), text[1]))
