"""What pages are made of: sections, cards, tables and plots, in one look; no script, nothing from the network."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any
from xml.etree import ElementTree

from toolkit.report.plots import COLORS, Plot, clean

_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1160px;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.5rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2.2rem 0 .8rem}
h3{font-size:.95rem;margin:0 0 .5rem}p{margin:.4rem 0}.muted,figcaption{color:var(--muted);font-size:.85rem}
.badge{display:inline-block;vertical-align:middle;margin-left:.6rem;padding:.1rem .6rem;border-radius:1rem;
font-size:.8rem;font-weight:600;border:1px solid currentColor}
.finished{color:var(--series-3)}.interrupted,.unfinished{color:var(--series-2)}.failed{color:var(--bad)}
.tiles,.grid{display:grid;gap:.9rem}.tiles{grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));margin:1.2rem 0}
.grid{grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr));align-items:start}
.card{background:var(--surface);border:1px solid var(--line);border-radius:.6rem;padding:.9rem 1rem;
margin:0;min-width:0}
.tile b{display:block;font-size:1.45rem;font-weight:650;font-variant-numeric:tabular-nums}
.whole{grid-column:1/-1}.scroll-x{overflow-x:auto}.scroll{overflow:auto;max-height:32rem}
figure svg{display:block;width:100%;height:auto;margin:0 auto}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figure svg text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif!important}
figcaption{margin-top:.4rem}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .7rem .28rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);
overflow-wrap:break-word}
tr:last-child>*{border-bottom:0}th{font-weight:600}
thead th{color:var(--muted);position:sticky;top:0;background:var(--surface)}
th.n,td.n{text-align:right;white-space:nowrap;padding-right:.2rem;padding-left:.7rem}
tr.changed td:last-child{font-weight:650;color:var(--series-2)}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;
font:.82rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace}
summary{cursor:pointer;font-weight:600}details pre{margin-top:.7rem}ul{margin:.3rem 0;padding-left:1.2rem}
.gallery{display:flex;flex-wrap:wrap;gap:.9rem}.gallery figure{margin:0;width:8rem}
.gallery img{image-rendering:pixelated;max-width:100%;display:block;border:1px solid var(--line)}
"""
_PAGE_COLORS = {**COLORS, "--page": ("#f4f6f8", "#0e1319"), "--bad": ("#c62f2f", "#ff8080")}


def page(title: str, body: str) -> str:
    """The whole page."""
    light, dark = ("".join(f"{name}:{pair[i]};" for name, pair in _PAGE_COLORS.items()) for i in (0, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<style>
:root{{color-scheme:light dark;{light}}}
@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_CSS}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def section(title: str, content: str) -> str:
    """A part of the page under its title; nothing where it has no content."""
    return f"<section>\n<h2>{escaped(title)}</h2>\n{content}</section>\n" if content else ""


def grid(cards: Iterable[str]) -> str:
    """Cards beside each other, as many as fit."""
    content = "".join(cards)
    return f'<div class="grid">\n{content}</div>\n' if content else ""


def card(content: str, kind: str = "card") -> str:
    """A frame; `card whole` is as wide as the page."""
    return f'<div class="{kind}">{content}</div>\n'


def figure(plot: Plot) -> str:
    """A plot in a card, with its description."""
    kind = "card whole" if plot.wide else "card"
    return (
        f'<figure class="{kind}"><h3>{escaped(plot.title)}</h3><div class="scroll-x">{to_svg(plot)}</div>'
        f"<figcaption>{escaped(plot.text)}</figcaption></figure>\n"
    )


def to_svg(plot: Plot) -> str:
    """The plot as an `<svg>` element for a page: ids of its own, the page's colours, a title for those who listen."""
    name = plot.title.lower().replace(" ", "-")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        buffer = io.BytesIO()
        plot.figure.savefig(buffer, format="svg")
    root = ElementTree.fromstring(buffer.getvalue().decode())
    _strip(root)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.set(key.replace(_XLINK, ""), _page_value(key, value, name))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    width = plot.figure.get_size_inches()[0] * 72
    least = f"min-width:{width:.0f}px;" if plot.wide else ""
    look = f"{least}max-width:{1.5 * width:.0f}px"
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-text", "style": look}
    for i, (tag, content) in enumerate((("title", plot.title), ("desc", plot.text))):
        child = ElementTree.Element(tag, id=f"{name}-{'title' if i == 0 else 'text'}")
        child.text = content
        root.insert(i, child)
    return ElementTree.tostring(root, encoding="unicode")


def _strip(root: ElementTree.Element) -> None:
    """Take out matplotlib's metadata, and its style sheet, which would hold for the whole page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)


def _page_value(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == f"{_XLINK}href":
        return f"#{name}-{value[1:]}"
    if key in ("style", "clip-path"):
        value = value.replace("url(#", f"url(#{name}-")
        for variable, (light, _) in COLORS.items():
            value = value.replace(light, f"var({variable})")
    return value


def bullets(lines: Sequence[str]) -> str:
    """A list in a card."""
    items = "".join(f"<li>{escaped(line)}</li>" for line in lines)
    return card(f"<ul>{items}</ul>") if items else ""


def table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    numbers: int = 0,
    changed: Any = None,
) -> str:
    """A table whose last `numbers` columns are figures; a row is emphasised where `changed(row)` holds."""

    def kind(column: int, width: int) -> str:
        return ' class="n"' if column >= width - numbers else ""

    head = "".join(f'<th scope="col"{kind(i, len(header))}>{escaped(cell)}</th>' for i, cell in enumerate(header))
    lines = [f"<thead><tr>{head}</tr></thead>\n" if head else "", "<tbody>\n"]
    for name, *cells in rows:
        mark = ' class="changed"' if changed and changed((name, *cells)) else ""
        columns = "".join(
            f"<td{kind(i, len(cells) + 1)}>{escaped(readable(cell))}</td>" for i, cell in enumerate(cells, 1)
        )
        lines.append(f'<tr{mark}><th scope="row">{escaped(name)}</th>{columns}</tr>\n')
    return f'<h3>{escaped(title)}</h3><div class="scroll"><table>\n{"".join(lines)}</tbody>\n</table></div>'


def readable(value: Any) -> str:
    """A value as a reader wants it: counts with commas, measures with four digits, nothing as a dash."""
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float) and math.isfinite(value):
        if value.is_integer():
            return f"{value:,.0f}"
        return (
            f"{value:.4f}"
            if 0.001 <= abs(value) < 10
            else f"{value:,.1f}"
            if 10 <= abs(value) < 1e7
            else f"{value:.3g}"
        )
    return str(value)


def escaped(text: object) -> str:
    """Text that is safe in a page."""
    return escape(clean(text))
