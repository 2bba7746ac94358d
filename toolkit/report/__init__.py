"""What a run shows and leaves behind: its folder, its screen, its trackers and its page.

`write_html` is imported when it is called: matplotlib takes a second to import, and every rank imports this package.
"""

from __future__ import annotations

from pathlib import Path

from toolkit.report.console import Console, Shown
from toolkit.report.folder import RunFolder, build_manifest, redact, versions
from toolkit.report.trackers import Trackers

__all__ = ["Console", "RunFolder", "Shown", "Trackers", "build_manifest", "redact", "versions", "write_html"]


def write_html(folder: Path) -> Path:
    """Write `report.html` into a run's folder; see `toolkit.report.html.write_html`."""
    from toolkit.report.html import write_html as write

    return write(folder)
