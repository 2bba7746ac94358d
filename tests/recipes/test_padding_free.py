"""A run without padding gives the figures of the padded one, under every kind of strategy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from tests.ranks import on_ranks
from tests.recipes.launching import recipe

PLACES = [("single", 1), ("ddp", 2), ("fsdp", 2), ("zero1", 2), ("zero3", 2)]


def curve(job: list[str], run: Path, ranks: int, wish: str) -> list[float]:
    """Losses and gradient norms of all steps, and the losses of the evaluations."""
    options = [*job, "--train.padding_free", wish, "--run.dir", str(run)]
    for code, text in on_ranks(recipe, ranks, options, str(run.parent)):
        assert code == 0, text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((run / "report.json").read_text())
    assert report["plan"]["training"]["padding"].startswith("none" if wish == "on" else "to the longest")
    losses = [report["before"]["loss"], report["test"]["loss"], *(line["loss"] for line in report["evaluations"])]
    return [line[key] for line in lines for key in ("loss", "grad_norm")] + losses


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return {}


@pytest.mark.parametrize(("strategy", "ranks"), PLACES)
def test_same_curve(
    strategy: str, ranks: int, tiny_job: list[str], padded: dict[str, list[float]], tmp_path: Path
) -> None:
    job = [*tiny_job, "--train.micro_batch", "3"]
    if "curve" not in padded:
        padded["curve"] = curve([*job, "--strategy.name", "single"], tmp_path / "padded", 1, "off")
    found = curve([*job, "--strategy.name", strategy], tmp_path / "run", ranks, "on")
    assert found == pytest.approx(padded["curve"], rel=1e-5)


def test_the_saved_model_is_as_any_other(tiny_job: list[str], tmp_path: Path) -> None:
    curve(tiny_job, tmp_path / "run", 1, "on")
    for folder in ("model", "base"):
        assert "padding_free" not in (tmp_path / "run" / folder / "config.json").read_text()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config._attn_implementation == "sdpa"


def test_a_wish_that_cannot_be_granted(tiny_job: list[str], tmp_path: Path) -> None:
    options = [*tiny_job, "--train.padding_free", "on", "--model.attention", "eager"]
    code, text = on_ranks(recipe, 1, options, str(tmp_path))[0]
    assert code == 2
    assert "--train.padding_free on has no effect on this model: its attention is to be eager" in " ".join(text.split())
