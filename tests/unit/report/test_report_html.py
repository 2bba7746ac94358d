"""The page of a run: valid, self-contained, escaped, and only as long as the run was."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.errors import CheckpointError
from toolkit.report import RunFolder, build_manifest, write_html
from toolkit.report.plots import SHOWN_CLASSES, moving_average, shorten

EVIL = "<script>alert('x')</script> & $E=mc^2$ \x00\x1b[31m"
LABELS = ["体育", "财经新闻", EVIL, "$x^2$"]
VOID = {"meta", "br", "hr", "img", "link", "input"}


def confusion(labels: int) -> list[list[int]]:
    return (np.eye(labels, dtype=int) * 17 + 1).tolist()


def metrics(steps: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "loss": float("nan") if step == 5 else 2 * math.exp(-step / 30) + 0.1 * (step % 3),
            "grad_norm": 1 + 1 / step,
            "lr": 1e-5 * step,
            "samples_seen": 32 * step,
            "samples_per_second": 300 + step % 7,
            "loss_scale": 2.0 ** (16 - step // 20),
            "skipped": step % 20 == 0,
        }
        for step in range(1, steps + 1)
    ]


def report(labels: list[str]) -> dict[str, Any]:
    figures = {"accuracy": 0.8125, "macro_precision": 0.8, "macro_recall": 0.81, "macro_f1": 0.8051, "loss": 0.4321}
    per_class = [{"label": label, "precision": 0.9, "recall": 0.7, "f1": 0.79, "support": 20} for label in labels]
    counts = {split: {label: 10 + i for i, label in enumerate(labels)} for split in ("train", "validation", "test")}
    histogram = {"edges": [0, 32, 64, 96], "counts": [10, 30, 5]}
    return {
        "status": "finished",
        "seconds": 12.5,
        "samples_per_second": 301.5,
        "steps": 60,
        "majority": 0.25,
        "labels": labels,
        "before": {**figures, "accuracy": 0.2345, "loss": 1.6},
        "test": {**figures, "units": 80, "confusion": confusion(len(labels)), "per_class": per_class},
        "evaluations": [{"step": s, "loss": 1 / s, "accuracy": 1 - 1 / s, "macro_f1": 1 - 2 / s} for s in (20, 40, 60)],
        "data": {
            "counts": counts,
            "lengths": dict.fromkeys(counts, histogram),
            "max_length": 64,
            "warnings": [EVIL],
            "truncated": {"train": 0.125},
        },
        "plan": {EVIL: {EVIL: EVIL}},
        "learning_rates": [1e-5 * step for step in range(1, 81)],
        "run": EVIL,
        "predict": EVIL,
        "balance": {"imbalance": 0.0125, "waited": 0.0311},
    }


def make_run(folder: Path, labels: list[str] = LABELS) -> RunFolder:
    run = RunFolder(folder)
    run.write_config(f'data:\n  name: "{EVIL[:27]}"\n')
    settings = {"precision": "auto", "train": {"global_batch": 32, "note": EVIL}}
    effective = {"precision": "bf16", "train": {"global_batch": 32, "note": EVIL}}
    run.write_manifest(build_manifest(["x.py", EVIL], 0, "sha256:1", settings, effective, {"ranks": 2}))
    run.append_metrics(metrics(60))
    run.write_report(report(labels))
    return run


class Checker(HTMLParser):
    """Balance of the tags, ids, and all text that a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]
        assert len({name for name, _ in attrs}) == len(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def titles(self) -> list[str]:
        return [text for text in self.text["h3"] if text.strip()]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_html(make_run(tmp_path_factory.mktemp("run")).path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def checked(page: str) -> Checker:
    return Checker(page)


def test_every_plot_is_there_with_a_title_and_a_text(checked: Checker) -> None:
    plots = {
        *("Loss", "Validation", "Learning rate", "Gradient norm", "Throughput", "Loss scale"),
        *("Confusion matrix", "Labels", "Lengths"),
    }
    assert plots <= set(checked.titles())
    assert checked.tags.count("svg") == len(plots)
    assert checked.tags.count("desc") == len(plots)
    assert all(text.strip() for text in checked.text["desc"])
    assert sum(name == "role" and value == "img" for name, value in checked.attributes) == len(plots)


def test_ids_are_unique_and_references_lead_somewhere(page: str, checked: Checker) -> None:
    assert len(checked.ids) > 100
    assert len(set(checked.ids)) == len(checked.ids)
    references = re.findall(r"url\(#([^)]+)\)", page)
    references += [(value or "")[1:] for name, value in checked.attributes if name == "href"]
    for name, value in checked.attributes:
        references += (value or "").split() if name == "aria-labelledby" else []
    assert len(references) > 50
    assert set(references) <= set(checked.ids)


def test_the_page_needs_neither_network_nor_script(page: str, checked: Checker) -> None:
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert not {"script", "link", "img", "iframe", "object", "metadata"} & set(checked.tags)
    assert checked.tags.count("style") == 1
    assert not [name for name, _ in checked.attributes if name.startswith("on")]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in checked.attributes


def test_mistakes_are_shown_as_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    mistake = {"image": "iVBORw0KGgo=", "where": EVIL, "label": EVIL, "predicted": "dog", "score": 0.987}
    run.write_report(report(LABELS) | {"mistakes": [mistake]})
    page = write_html(run.path).read_text(encoding="utf-8")
    checked = Checker(page)
    assert checked.tags.count("img") == 1
    assert ("src", "data:image/png;base64,iVBORw0KGgo=") in checked.attributes
    assert any("taken for dog (99 %)" in text for text in checked.text["figcaption"])
    assert "<script" not in page


def test_what_users_wrote_is_text(page: str, checked: Checker) -> None:
    assert "<script" not in page
    assert "\x00" not in page
    assert "\x1b" not in page
    shown = EVIL.replace("\x00", "�").replace("\x1b", "�")
    assert shown in checked.text["th"]
    assert shown in checked.text["td"]
    assert shown in checked.text["li"]
    assert any("<script>" in text for text in checked.text["pre"])
    assert sum(shorten(EVIL) == text for text in checked.text["text"]) == 3


def test_labels_stay_text_that_the_browser_renders(checked: Checker) -> None:
    for label in ("财经新闻", "$x^2$"):
        assert sum(text == label for text in checked.text["text"]) == 3


def test_the_figures_are_those_of_the_report(page: str, checked: Checker) -> None:
    cells = checked.text["td"]
    for figure in ("0.2345", "0.8125", "0.8051", "1.6000", "0.4321", "80", "0.7900"):
        assert figure in cells
    assert "0.8125" in checked.text["b"]
    drawing = next(svg for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL) if 'id="confusion-matrix-title"' in svg)
    counts = Checker(drawing).text["text"]
    assert (counts.count("18"), counts.count("1")) == (4, 12)
    assert any("72 of 84 on the diagonal" in text for text in checked.text["figcaption"])
    assert any("Cut at 64 tokens: 12.5 % of train." in text for text in checked.text["figcaption"])


def test_settings_that_took_another_value_stand_out(page: str) -> None:
    changed = re.findall(r'<tr class="changed"><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', page)
    assert changed == [("precision", "auto", "bf16")]


def test_plots_take_their_colours_from_the_page(page: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) == set()
    used = set(re.findall(r"var\((--[\w-]+)\)", drawings))
    assert {"--ink", "--muted", "--series-1", "--series-2", "--series-3"} <= used
    for variable in used:
        # Once for the light page and once for the dark one.
        assert page.count(f"{variable}:#") == 2


@pytest.mark.parametrize(
    "missing",
    [
        ["report_path"],
        ["manifest_path", "config_path"],
        ["metrics_path"],
        ["report_path", "metrics_path", "manifest_path"],
        ["report_path", "metrics_path", "config_path"],
    ],
)
def test_a_run_that_lacks_files_gets_a_shorter_page(tmp_path: Path, page: str, missing: list[str]) -> None:
    run = make_run(tmp_path)
    for name in missing:
        getattr(run, name).unlink()
    shorter = write_html(tmp_path).read_text()
    Checker(shorter)
    assert len(shorter) < len(page)
    assert ('class="badge unfinished"' in shorter) == ("report_path" in missing)


@pytest.mark.parametrize("key", [*report(LABELS)])
def test_a_report_that_lacks_a_part_gets_a_shorter_page(tmp_path: Path, key: str) -> None:
    run = RunFolder(tmp_path)
    content = report(LABELS)
    del content[key]
    run.write_report(content)
    Checker(write_html(tmp_path).read_text())


def test_a_report_of_nulls_gets_a_page(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_report(dict.fromkeys(report(LABELS)))
    Checker(write_html(tmp_path).read_text())
    content = report(LABELS)
    run.write_report({**content, **{key: dict.fromkeys(content[key]) for key in ("before", "test", "data")}})
    Checker(write_html(tmp_path).read_text())


def test_an_interrupted_run_has_no_test_but_a_plan_of_the_rest(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    content = report(LABELS)
    del content["before"], content["test"]
    run.write_report({**content, "status": "interrupted"})
    page = write_html(tmp_path).read_text()
    checked = Checker(page)
    assert "interrupted" in checked.text["span"]
    assert "Confusion matrix" not in checked.titles()
    assert "planned" in checked.text["text"]


def test_figures_that_are_null_are_dashes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    content = report(LABELS)
    content["test"] = {**content["test"], "loss": float("nan")}
    content["evaluations"] = [{"step": 1, "loss": float("inf"), "accuracy": 0.5, "macro_f1": None}]
    run.write_report(content)
    run.append_metrics([{"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1}])
    checked = Checker(write_html(tmp_path).read_text())
    assert "–" in checked.text["td"]
    assert "Loss" not in checked.titles()
    assert "Learning rate" in checked.titles()


def test_many_labels_are_not_annotated_and_cut(tmp_path: Path) -> None:
    labels = [f"label-{i:03d}" for i in range(75)]
    run = RunFolder(tmp_path)
    run.write_report({"labels": labels, "test": {"confusion": confusion(75)}})
    page = write_html(tmp_path).read_text()
    checked = Checker(page)
    assert f"Only the {SHOWN_CLASSES} most frequent labels" in page
    assert sum(text.startswith("label-") for text in checked.text["text"]) == 2 * SHOWN_CLASSES
    assert "18" not in checked.text["text"]


def test_a_long_run_keeps_its_spikes_in_a_small_page(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    lines = [{"step": i, "loss": 1.0, "grad_norm": 40.0 if i == 31_337 else 1 + i % 5 / 10} for i in range(1, 50_001)]
    run.append_metrics(lines)
    assert len(write_html(tmp_path).read_text()) < 300_000
    from toolkit.report.plots import _series, _thin

    steps, norms = _thin(*_series(lines, "grad_norm"))
    assert len(steps) <= 1500
    assert norms[steps == 31_337].tolist() == [40.0]
    assert np.all(np.diff(steps) > 0)


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no files of a run"):
        write_html(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_global_state_of_matplotlib_is_left_alone(tmp_path: Path) -> None:
    make_run(tmp_path)
    script = (
        "import sys, warnings, matplotlib\nfrom toolkit.report import write_html\nwarnings.simplefilter('error')\n"
        "matplotlib.rcParams['font.size'] = 31\nmatplotlib.rcParams['svg.fonttype'] = 'path'\n"
        # To ask for the backend is to choose one, for which matplotlib imports pyplot.
        "settings = lambda: {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != 'backend'}\n"
        "before = settings()\nwrite_html(sys.argv[1])\n"
        "assert settings() == before\nassert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_the_moving_average_is_unbiased_and_passes_over_gaps() -> None:
    assert moving_average(np.full(40, 3.0)) == pytest.approx(np.full(40, 3.0))
    smooth = moving_average(np.array([math.nan, 1.0, math.nan, 1.0]), window=3)
    assert math.isnan(smooth[0])
    assert smooth[1:] == pytest.approx([1.0, 1.0, 1.0])
    assert moving_average(np.array([0.0, 9.0]), window=3)[1] == pytest.approx(9 / (1 + 2 / 3))


def test_labels_are_cut_by_columns() -> None:
    assert shorten("a" * 22) == "a" * 22
    assert shorten("a" * 23) == "a" * 21 + "…"
    assert shorten("体" * 12) == "体" * 10 + "…"
    assert shorten("a\n b") == "a b"
