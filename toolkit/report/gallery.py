"""Images that a model took for something else, as a part of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from toolkit.report.plots import clean, shorten


def gallery(mistakes: Sequence[Mapping[str, Any]]) -> str:
    """A picture for each mistake, with what it is, what it was taken for and how surely; empty where there are none.

    Args:
        mistakes: `image` (a PNG in base64), `where`, `label`, `predicted` and `score` of each.
    """
    shown = "".join(map(_picture, mistakes))
    return f'<h3>Surest mistakes</h3><div class="gallery">\n{shown}</div>' if shown else ""


def _picture(mistake: Mapping[str, Any]) -> str:
    where, label, predicted = (escape(clean(mistake[key])) for key in ("where", "label", "predicted"))
    caption = f"{escape(shorten(mistake['label']))}, taken for {escape(shorten(mistake['predicted']))}"
    return (
        f'<figure><img src="data:image/png;base64,{escape(mistake["image"])}" title="{where}" '
        f'alt="{label}, taken for {predicted}"><figcaption>{caption} ({100 * mistake["score"]:.0f} %)'
        "</figcaption></figure>\n"
    )
