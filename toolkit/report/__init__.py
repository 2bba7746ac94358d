"""What a run shows and leaves behind: its folder, its screen, its trackers and its page.

`write_html` and `model_card` are imported when they are called: matplotlib takes a second to import, and every rank
imports this package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.report.console import Console, Shown
from toolkit.report.folder import RunFolder, build_manifest, redact, versions
from toolkit.report.trackers import Trackers

__all__ = [
    "Console",
    "RunFolder",
    "Shown",
    "Trackers",
    "build_manifest",
    "model_card",
    "redact",
    "versions",
    "write_html",
]


def write_html(folder: Path | RunFolder) -> Path:
    """Write `report.html` into a run's folder; see `toolkit.report.html.write_html`."""
    from toolkit.report.html import write_html as write

    return write(folder)


def model_card(report: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """The README of a saved model; see `toolkit.report.card.model_card`."""
    from toolkit.report.card import model_card as card

    return card(report, manifest)
