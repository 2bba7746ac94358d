"""The recipe through the real `accelerate launch`, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.processes import alive
from tests.ranks import on_ranks
from tests.recipes.launching import RECIPE, ROOT, assert_same_curve, launch, recipe, start
from toolkit.config import from_yaml

STARTS = {
    "single": ("cpu1", [], []),
    "ddp": ("cpu2", [], []),
    "fsdp": ("cpu2", [], ["--strategy.name", "fsdp"]),
    "zero3": ("cpu2", [], ["--strategy.name", "zero3"]),
    "fsdp by the launcher": ("gpu_fsdp", ["--num_processes", "2"], []),
    "zero3 by the launcher": ("gpu_zero3", ["--num_processes", "2"], []),
}


def read(folder: Path) -> tuple[list[dict], dict, dict]:  # type: ignore[type-arg]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return metrics, json.loads((folder / "report.json").read_text()), json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def runs() -> dict[str, Path]:
    return {}


@pytest.mark.parametrize("name", STARTS)
def test_launch(name: str, tiny_job: list[str], runs: dict[str, Path], tmp_path: Path) -> None:
    config, launcher, options = STARTS[name]
    done = launch([*tiny_job, *options, "--run.dir", "run"], config=config, launcher=launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    folder = runs[name] = tmp_path / "run"
    metrics, report, manifest = read(folder)

    strategy = name.split()[0]
    ranks = 1 if strategy == "single" else 2
    effective = manifest["effective"]
    assert (effective["strategy"], effective["ranks"]) == (strategy, ranks)
    if strategy in ("fsdp", "zero3"):
        assert effective["share_of_this_rank"] == pytest.approx(0.5, rel=0.1)
    assert [line["step"] for line in metrics] == list(range(1, 10))
    assert {"step", "loss", "grad_norm", "lr", "units", "samples_seen"} <= set(metrics[0])
    assert metrics[-1]["samples_seen"] == 9 * 12
    assert report["status"] == "finished"
    assert report["test"]["units"] == report["before"]["units"] == 24
    assert report["test"]["loss"] < report["before"]["loss"]
    assert {"accuracy", "macro_f1", "macro_precision", "macro_recall", "loss"} <= set(report["before"])
    assert (folder / "report.html").stat().st_size > 10_000
    if name != "single":
        alone = read(runs["single"])[0]
        assert_same_curve(metrics, alone)
        assert [m["lr"] for m in metrics] == [m["lr"] for m in alone]


def test_what_is_shown(tiny_job: list[str], tmp_path: Path) -> None:
    code, text = on_ranks(recipe, 1, [*tiny_job, "--run.name", "shown"], str(tmp_path))[0]
    assert code == 0, text
    for expected in ("parameters", "samples", "precision", "learning rate", "samples per label", "step 9/9", "time"):
        assert expected in text
    for expected in ("accuracy", "macro precision", "macro recall", "macro F1", "majority", "runs/bert_cls/shown"):
        assert expected in text
    assert "toolkit predict runs/bert_cls/shown" in text


def test_the_saved_model_is_the_trained_one(tiny_job: list[str], texts_csv: Path, tmp_path: Path) -> None:
    """Reloaded with transformers, it reaches the accuracy that the run reported on the held-out texts."""
    options = [*tiny_job, "--train.steps", "80", "--strategy.name", "fsdp", "--run.dir", "run"]
    code, text = on_ranks(recipe, 2, options, str(tmp_path))[0]
    assert code == 0, text
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "money", 1: "music", 2: "sport"}
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values() if tensor.is_floating_point())
    _, report, _ = read(tmp_path / "run")
    rows = [line.split(",") for line in texts_csv.read_text().splitlines()[1:]]
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(-1).tolist()
    right = sum(model.config.id2label[p] == label for p, (_, label) in zip(predicted, rows, strict=True)) / len(rows)
    assert right == pytest.approx(report["test"]["accuracy"], abs=0.15)
    assert right > report["majority"] + 0.4


def test_runs_are_numbered(tiny_job: list[str], tmp_path: Path) -> None:
    for seed in ("1", "2"):
        assert on_ranks(recipe, 1, [*tiny_job, "--train.steps", "1", "--run.seed", seed], str(tmp_path))[0][0] == 0
    assert sorted(p.name for p in (tmp_path / "runs" / "bert_cls").iterdir()) == ["001", "002"]


def test_evaluation_early_stopping_and_trackers(tiny_job: list[str], tmp_path: Path) -> None:
    options = [*tiny_job, "--train.steps", "60", "--optim.lr", "0.05", "--run.eval_every", "2", "--run.dir", "run"]
    options += ["--run.early_stopping", "2", "--run.trackers", "tensorboard"]
    code, text = on_ranks(recipe, 1, options, str(tmp_path))[0]
    assert code == 0, text
    _, report, _ = read(tmp_path / "run")
    losses = [evaluation["loss"] for evaluation in report["evaluations"]]
    best = losses.index(min(losses))
    assert report["steps"] == report["evaluations"][-1]["step"] < 60
    assert len(losses) - 1 - best == 2
    assert "early stopping" in text
    assert list((tmp_path / "run" / "tensorboard").rglob("events.*"))


def test_fp16_reports_its_scale(tiny_job: list[str], tmp_path: Path) -> None:
    code, text = on_ranks(recipe, 1, [*tiny_job, "--precision", "fp16", "--run.dir", "run"], str(tmp_path))[0]
    assert code == 0, text
    metrics, report, _ = read(tmp_path / "run")
    assert all(line["loss_scale"] >= 1 and line["skipped"] in (True, False) for line in metrics)
    assert report["skipped_steps"] == sum(line["skipped"] for line in metrics)


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_loss_that_is_not_finite_stops_with_step_rank_and_samples(
    strategy: str, tiny_job: list[str], tmp_path: Path
) -> None:
    options = [*tiny_job, "--optim.lr", "1e30", "--strategy.name", strategy, "--run.dir", "run"]
    (code, text), (other, line) = on_ranks(recipe, 2, options, str(tmp_path))
    assert (code, other) == (2, 2)
    assert re.search(r"(loss|gradient norm) is (nan|inf) at step \d+ \(rank \d+: samples \[\d+", " ".join(text.split()))
    assert "NumericsError" in line
    _, report, _ = read(tmp_path / "run")
    assert report["status"] == "failed"
    assert "test" not in report


@pytest.mark.parametrize("config", ["cpu1", "cpu2"])
def test_ctrl_c_ends_cleanly_with_a_partial_report(config: str, tiny_job: list[str], tmp_path: Path) -> None:
    process = start([*tiny_job, "--train.steps", "100000", "--run.dir", "run"], config=config, cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    deadline = time.monotonic() + 10
    while any(map(alive, family)):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)
    lines, report, _ = read(tmp_path / "run")
    assert report["status"] == "interrupted"
    assert report["steps"] == lines[-1]["step"]
    assert f"the same command goes on from step {report['steps']}" in " ".join(out.split())
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "checkpoints" / f"step_{report['steps']:08d}" / "manifest.json").exists()


def test_every_recipe_configuration_is_valid() -> None:
    from recipes.bert_cls import Config

    files = sorted((ROOT / "configs" / "bert_cls").glob("*.yaml"))
    assert files
    for file in files:
        assert from_yaml(Config, file) != Config()
        header = file.read_text().split("\n\n")[0]
        assert f"--config configs/bert_cls/{file.name}" in header
        assert "Hardware:" in header
        assert "Result:" in header


def test_help_and_print_config(tmp_path: Path) -> None:
    code, text = on_ranks(recipe, 1, ["--help"], str(tmp_path))[0]
    assert code == 0
    assert "accelerate launch recipes/bert_cls.py" in text
    assert "--train.global_batch" in text
    code, text = on_ranks(recipe, 1, ["--print-config", "--optim.lr", "0.5"], str(tmp_path))[0]
    assert code == 0
    assert "lr: 0.5" in text
    assert RECIPE.exists()
