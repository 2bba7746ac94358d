"""`report.html`: one page about a run, made from the files in its folder.

The page stands alone (no script, no network, forbidden by its own content policy), follows the reader's light or
dark setting and fits a phone. Whatever a run has not got to yet is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError
from toolkit.report import plots
from toolkit.report.answer_plots import answer_plots
from toolkit.report.data_page import stage_cards
from toolkit.report.elements import bullets, card, escaped, figure, grid, page, readable, section, table
from toolkit.report.figures import figures_in, titled
from toolkit.report.folder import RunFolder
from toolkit.report.gallery import gallery
from toolkit.report.plots import Plot
from toolkit.report.step_time import step_time_bar, step_time_rows


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


def write_html(folder: Path | RunFolder) -> Path:
    """Write `report.html` into a run's folder, from the files that are there.

    Raises:
        CheckpointError: there is no file of a run in `folder`, or one is damaged.
    """
    files = folder if isinstance(folder, RunFolder) else RunFolder(folder)
    run = _read(files)
    with plots.plot_style():
        body = "".join(_sections(run))
    files.write_page(page(f"{run.name} · training report", body))
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


def _sections(run: _Run) -> Iterable[str]:
    yield _head(run)
    yield _tiles(run)
    yield section("Data warnings", bullets(run.part("data", "warnings")))
    yield section("Held-out test", grid(_test_cards(run)))
    yield section("Training", grid(map(figure, _training_plots(run))))
    yield section("What the model writes", _texts(run.part("texts") or []))
    yield section("Where the time goes", _step_time(run.report.get("profile")))
    stages = run.part("data", "stages") or []
    yield section("Data", grid([*map(figure, _data_plots(run)), *stage_cards(stages)]))
    yield section("Plan", grid(_plan_cards(run)))
    yield section("How it was run", grid(_manifest_cards(run)))
    if run.config:
        config = f"<details><summary>config.yaml</summary><pre>{escaped(run.config)}</pre></details>"
        yield section("Configuration", card(config))


def _head(run: _Run) -> str:
    status = str(run.report.get("status") or "unfinished")
    known = status if status in ("finished", "interrupted", "failed") else "unfinished"
    started = run.manifest.get("started")
    parts = [f"started {started}" if started else "", f"on {run.manifest['host']}" if run.manifest.get("host") else ""]
    line = f'<p class="muted">{escaped(" ".join(filter(None, parts)))}</p>\n' if any(parts) else ""
    predict = run.report.get("predict")
    command = card(f"<h3>Predict with this model</h3><pre>{escaped(predict)}</pre>") if predict else ""
    return f'<h1>{escaped(run.name)}<span class="badge {known}">{escaped(status)}</span></h1>\n{line}{command}'


def _tiles(run: _Run) -> str:
    before, test = run.part("before"), run.part("test")
    tiles = []
    for key, name in ((found.key, found.name) for found in figures_in(test) if found.headline):
        if test[key] is not None:
            tiles.append((f"Test {name}", readable(test[key]), f"before {readable(before.get(key))}"))
    if run.report.get("majority") is not None:
        tiles.append(("Majority label", readable(run.report["majority"]), "accuracy of a constant answer"))
    steps = run.report.get("steps") or (run.metrics[-1].get("step") if run.metrics else None)
    if steps is not None:
        seen = run.metrics[-1].get("samples_seen") if run.metrics else None
        tiles.append(("Steps", readable(steps), f"{readable(seen)} samples" if seen else "of the optimizer"))
    if run.report.get("seconds") is not None:
        speed = run.report.get("samples_per_second")
        tiles.append(("Time", _duration(run.report["seconds"]), f"{readable(speed)} samples/s" if speed else ""))
    if balance := run.part("balance"):
        waited, apart = (f"{100 * balance[key]:.1f} %" for key in ("waited", "imbalance"))
        tiles.append(("Waiting for the slowest rank", waited, f"of data and forward; work dealt {apart} apart"))
    cards = "".join(
        f'<div class="card tile"><span class="muted">{escaped(name)}</span><b>{escaped(value)}</b>'
        f'<span class="muted">{escaped(note)}</span></div>\n'
        for name, value, note in tiles
    )
    return f'<div class="tiles">\n{cards}</div>\n' if cards else ""


def _test_cards(run: _Run) -> Iterable[str]:
    before, test = run.part("before"), run.part("test")
    rows = [(titled(found.name), before.get(found.key), test.get(found.key)) for found in figures_in(before, test)]
    if rows:
        if run.report.get("majority") is not None:
            rows.insert(1, ("Majority label", run.report["majority"], run.report["majority"]))
        yield card(table("Before and after", ("", "before", "after"), rows, numbers=2))
    if others := run.part("baselines"):
        models = [test, *others.values()]
        side = [(titled(found.name), *(model.get(found.key) for model in models)) for found in figures_in(*models[1:])]
        yield card(table("On the same samples", ("", "this network", *others), side, numbers=len(models)))
    yield from map(figure, answer_plots(test.get("answers") or {}))
    per_class = [
        (line.get("label"), *(line.get(key) for key in ("precision", "recall", "f1", "support")))
        for line in test.get("per_class") or []
    ]
    if per_class:
        yield card(table("Per label", ("label", "precision", "recall", "F1", "samples"), per_class, numbers=4))
    confusion = plots.confusion_plot(test.get("confusion") or [], run.part("labels") or [])
    if confusion:
        yield figure(confusion)
    if pictures := gallery(run.part("mistakes") or []):
        yield card(pictures, "card whole")


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
    if any("wanted" in line for line in texts):
        title, columns = "Written for samples of the test", {"prompt": "given", "text": "written", "wanted": "wanted"}
    else:
        title, columns = "Continued from each prompt", {"prompt": "prompt", "text": "text"}
    rows = [(line.get("step"), *map(line.get, columns)) for line in reversed(texts)]
    return card(table(title, ("after step", *columns.values()), rows)) if rows else ""


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
    return card(step_time_bar(profile) + table("Parts of a step", header, rows, numbers=len(header) - 1))


def _plan_cards(run: _Run) -> Iterable[str]:
    for title, settings in run.part("plan").items():
        yield card(table(title, (), list(settings.items())))


def _manifest_cards(run: _Run) -> Iterable[str]:
    manifest = run.manifest
    requested, effective = (_flat(manifest.get(key) or {}) for key in ("requested", "effective"))
    if requested or effective:
        rows = [(key, requested.get(key), effective.get(key)) for key in {**requested, **effective}]
        header = ("setting", "requested", "effective")
        title = "Requested and effective settings"
        yield card(table(title, header, rows, changed=lambda row: row[1] != row[2]), "card whole")
    if manifest.get("command"):
        yield card(f"<h3>Command</h3><pre>{escaped(manifest['command'])}</pre>", "card whole")
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
            yield card(table(title, (), list(_flat(values).items())))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
