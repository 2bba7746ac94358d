"""`report.html`: one page about a run, made from the files in its folder.

The page stands alone (no script, no network, forbidden by its own content policy), follows the reader's light or
dark setting and fits a phone. Whatever a run has not got to yet is left out.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from toolkit.errors import CheckpointError
from toolkit.report import plots
from toolkit.report.figures import figures_in, titled
from toolkit.report.folder import RunFolder
from toolkit.report.gallery import CSS, gallery
from toolkit.report.plots import COLORS, Plot, clean
from toolkit.report.step_time import step_time_bar, step_time_rows

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
"""
_PAGE_COLORS = {**COLORS, "--page": ("#f4f6f8", "#0e1319"), "--bad": ("#c62f2f", "#ff8080")}


@dataclass(frozen=True)
class _Run:
    """What was found in the run's folder; what was not found is empty."""

    name: str
    config: str
    manifest: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    report: Mapping[str, Any]

    def part(self, *keys: str) -> Any:
        """A part of the report, or an empty mapping."""
        part: Any = self.report
        for key in keys:
            part = part.get(key) or {}
        return part


def write_html(folder: Path) -> Path:
    """Write `report.html` into a run's folder, from the files that are there.

    Raises:
        CheckpointError: there is no file of a run in `folder`, or one is damaged.
    """
    files = RunFolder(folder)
    run = _read(files)
    with plots.plot_style():
        body = "".join(_sections(run))
    files.write_page(_page(run, body))
    return files.html_path


def _read(files: RunFolder) -> _Run:
    if not any(p.exists() for p in (files.config_path, files.manifest_path, files.metrics_path, files.report_path)):
        raise CheckpointError(
            f"{files.path}: no files of a run in this folder.",
            "Name the folder of a run (it holds config.yaml, manifest.json, metrics.jsonl and report.json).",
        )
    return _Run(
        name="/".join(files.path.resolve().parts[-2:]),
        config=files.read_config() if files.config_path.exists() else "",
        manifest=files.read_manifest() if files.manifest_path.exists() else {},
        metrics=files.read_metrics() if files.metrics_path.exists() else [],
        report=files.read_report() if files.report_path.exists() else {},
    )


def _page(run: _Run, body: str) -> str:
    light, dark = ("".join(f"{name}:{pair[i]};" for name, pair in _PAGE_COLORS.items()) for i in (0, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(run.name)} · training report</title>
<style>
:root{{color-scheme:light dark;{light}}}
@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_CSS}{CSS}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def _sections(run: _Run) -> Iterable[str]:
    yield _head(run)
    yield _tiles(run)
    yield _section("Data warnings", _list(run.part("data", "warnings")))
    yield _section("Held-out test", _grid(_test_cards(run)))
    yield _section("Training", _grid(map(_figure, _training_plots(run))))
    yield _section("What the model writes", _texts(run.part("texts") or []))
    yield _section("Where the time goes", _step_time(run.report.get("profile")))
    yield _section("Data", _grid(map(_figure, _data_plots(run))))
    yield _section("Plan", _grid(_plan_cards(run)))
    yield _section("How it was run", _grid(_manifest_cards(run)))
    if run.config:
        config = f"<details><summary>config.yaml</summary><pre>{_text(run.config)}</pre></details>"
        yield _section("Configuration", _card(config))


def _head(run: _Run) -> str:
    status = str(run.report.get("status") or "unfinished")
    known = status if status in ("finished", "interrupted", "failed") else "unfinished"
    started = run.manifest.get("started")
    parts = [f"started {started}" if started else "", f"on {run.manifest['host']}" if run.manifest.get("host") else ""]
    line = f'<p class="muted">{_text(" ".join(filter(None, parts)))}</p>\n' if any(parts) else ""
    predict = run.report.get("predict")
    command = _card(f"<h3>Predict with this model</h3><pre>{_text(predict)}</pre>") if predict else ""
    return f'<h1>{_text(run.name)}<span class="badge {known}">{_text(status)}</span></h1>\n{line}{command}'


def _tiles(run: _Run) -> str:
    before, test = run.part("before"), run.part("test")
    tiles = []
    for key, name in ((figure.key, figure.name) for figure in figures_in(test) if figure.headline):
        if test[key] is not None:
            tiles.append((f"Test {name}", _number(test[key]), f"before {_number(before.get(key))}"))
    if run.report.get("majority") is not None:
        tiles.append(("Majority label", _number(run.report["majority"]), "accuracy of a constant answer"))
    steps = run.report.get("steps") or (run.metrics[-1].get("step") if run.metrics else None)
    if steps is not None:
        seen = run.metrics[-1].get("samples_seen") if run.metrics else None
        tiles.append(("Steps", _number(steps), f"{_number(seen)} samples" if seen else "of the optimizer"))
    if run.report.get("seconds") is not None:
        speed = run.report.get("samples_per_second")
        tiles.append(("Time", _duration(run.report["seconds"]), f"{_number(speed)} samples/s" if speed else ""))
    if balance := run.part("balance"):
        waited, apart = (f"{100 * balance[key]:.1f} %" for key in ("waited", "imbalance"))
        tiles.append(("Waiting for the slowest rank", waited, f"of data and forward; work dealt {apart} apart"))
    cards = "".join(
        f'<div class="card tile"><span class="muted">{_text(name)}</span><b>{_text(value)}</b>'
        f'<span class="muted">{_text(note)}</span></div>\n'
        for name, value, note in tiles
    )
    return f'<div class="tiles">\n{cards}</div>\n' if cards else ""


def _test_cards(run: _Run) -> Iterable[str]:
    before, test = run.part("before"), run.part("test")
    rows = [(titled(found.name), before.get(found.key), test.get(found.key)) for found in figures_in(before, test)]
    if rows:
        if run.report.get("majority") is not None:
            rows.insert(1, ("Majority label", run.report["majority"], run.report["majority"]))
        yield _card(_table("Before and after", ("", "before", "after"), rows, numbers=2))
    per_class = [
        (line.get("label"), *(line.get(key) for key in ("precision", "recall", "f1", "support")))
        for line in test.get("per_class") or []
    ]
    if per_class:
        yield _card(_table("Per label", ("label", "precision", "recall", "F1", "samples"), per_class, numbers=4))
    confusion = plots.confusion_plot(test.get("confusion") or [], run.part("labels") or [])
    if confusion:
        yield _figure(confusion)
    if pictures := gallery(run.part("mistakes") or []):
        yield _card(pictures, "card whole")


def _training_plots(run: _Run) -> Iterable[Plot]:
    evaluations = run.part("evaluations") or []
    found = (
        plots.loss_plot(run.metrics, evaluations),
        plots.evaluation_plot(evaluations, run.report.get("majority")),
        plots.learning_rate_plot(run.metrics, run.part("learning_rates") or []),
        plots.gradient_norm_plot(run.metrics),
        plots.throughput_plot(run.metrics),
        plots.loss_scale_plot(run.metrics),
    )
    return filter(None, found)


def _texts(texts: Sequence[Mapping[str, Any]]) -> str:
    """The last ones first."""
    rows = [(line.get("step"), line.get("prompt"), line.get("text")) for line in reversed(texts)]
    return _card(_table("Continued from each prompt", ("after step", "prompt", "text"), rows)) if rows else ""


def _data_plots(run: _Run) -> Iterable[Plot]:
    labels = plots.label_plot(run.part("data", "counts"))
    lengths = plots.length_plot(
        run.part("data", "lengths"), run.part("data").get("max_length"), run.part("data", "truncated")
    )
    return filter(None, (labels, lengths))


def _step_time(profile: Mapping[str, Any] | None) -> str:
    if not profile:
        return ""
    header, rows = step_time_rows(profile)
    return _card(step_time_bar(profile) + _table("Parts of a step", header, rows, numbers=len(header) - 1))


def _plan_cards(run: _Run) -> Iterable[str]:
    for title, settings in run.part("plan").items():
        yield _card(_table(title, (), list(settings.items())))


def _manifest_cards(run: _Run) -> Iterable[str]:
    manifest = run.manifest
    requested, effective = (_flat(manifest.get(key) or {}) for key in ("requested", "effective"))
    if requested or effective:
        rows = [(key, requested.get(key), effective.get(key)) for key in {**requested, **effective}]
        header = ("setting", "requested", "effective")
        table = _table("Requested and effective settings", header, rows, changed=lambda row: row[1] != row[2])
        yield _card(table, "card whole")
    if manifest.get("command"):
        yield _card(f"<h3>Command</h3><pre>{_text(manifest['command'])}</pre>", "card whole")
    git, seed, data = (manifest.get(key) for key in ("git", "seed", "data_fingerprint"))
    code = {"commit": git.get("commit"), "uncommitted changes": git.get("dirty")} if git else {}
    origin = {**code, "seed": seed, "data fingerprint": data} if manifest else {}
    for title, values in (
        ("Origin", origin),
        ("Hardware", {"host": manifest.get("host"), **(manifest.get("hardware") or {})} if manifest else {}),
        ("World", manifest.get("world")),
        ("Versions", manifest.get("versions")),
        ("Environment", manifest.get("environment")),
    ):
        if values:
            yield _card(_table(title, (), list(_flat(values).items())))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{content}</section>\n" if content else ""


def _grid(cards: Iterable[str]) -> str:
    content = "".join(cards)
    return f'<div class="grid">\n{content}</div>\n' if content else ""


def _card(content: str, kind: str = "card") -> str:
    return f'<div class="{kind}">{content}</div>\n'


def _figure(plot: Plot) -> str:
    kind = "card whole" if plot.wide else "card"
    return (
        f'<figure class="{kind}"><h3>{_text(plot.title)}</h3><div class="scroll-x">{to_svg(plot)}</div>'
        f"<figcaption>{_text(plot.text)}</figcaption></figure>\n"
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


def _list(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return _card(f"<ul>{items}</ul>") if items else ""


def _table(
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

    head = "".join(f'<th scope="col"{kind(i, len(header))}>{_text(cell)}</th>' for i, cell in enumerate(header))
    lines = [f"<thead><tr>{head}</tr></thead>\n" if head else "", "<tbody>\n"]
    for name, *cells in rows:
        mark = ' class="changed"' if changed and changed((name, *cells)) else ""
        columns = "".join(
            f"<td{kind(i, len(cells) + 1)}>{_text(_number(cell))}</td>" for i, cell in enumerate(cells, 1)
        )
        lines.append(f'<tr{mark}><th scope="row">{_text(name)}</th>{columns}</tr>\n')
    return f'<h3>{_text(title)}</h3><div class="scroll"><table>\n{"".join(lines)}</tbody>\n</table></div>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _number(value: Any) -> str:
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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _text(text: object) -> str:
    return escape(clean(text))
