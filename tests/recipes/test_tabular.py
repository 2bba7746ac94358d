"""Tables: the same numbers everywhere, answers from raw values, and what is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.recipes.launching import ROOT, assert_same_curve, launch, learn, read
from tests.tables import COLUMNS, houses, write_csv
from toolkit.checkpoint.account import account
from toolkit.cli import main as toolkit
from toolkit.config import from_yaml

ROWS = houses(240)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("tables") / "houses.csv", COLUMNS, ROWS)


@pytest.fixture
def job(file: Path) -> list[str]:
    return [
        *("--data.name", str(file), "--data.target", "price", "--model.hidden_size", "16"),
        *("--train.global_batch", "24", "--train.steps", "10", "--optim.lr", "1e-2", "--baselines", "off"),
        *("--run.dir", "run", "--run.log_every", "1"),
    ]


train = functools.partial(learn, "tabular")


@pytest.mark.parametrize("kind", ["mlp", "ft_transformer"])
def test_the_same_numbers_everywhere(kind: str, job: list[str], tmp_path: Path) -> None:
    job = [*job, "--model.architecture", kind, "--data.dates", "sold"]
    train(1, job, tmp_path / "single")
    metrics, report = read(tmp_path / "single" / "run")
    assert report["test"]["loss"] < report["before"]["loss"]
    for strategy in ("ddp", "fsdp", "zero3") if kind == "mlp" else ("fsdp",):
        train(2, [*job, "--strategy.name", strategy], tmp_path / strategy)
        shared, its_report = read(tmp_path / strategy / "run")
        assert_same_curve(shared, metrics)
        for figure in ("r2", "mae", "rmse", "loss", "units"):
            assert its_report["test"][figure] == pytest.approx(report["test"][figure], rel=1e-5)
        assert its_report["test"]["answers"]["grid"] == report["test"]["answers"]["grid"]
        assert account(tmp_path / strategy / "run").sound


def test_it_learns_answers_raw_values_and_stands_beside_others(
    job: list[str], file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--train.steps", "150", "--run.eval_every", "75", "--baselines", "on", "--optim.lr", "5e-3"]
    shown = train(1, [*job, *options], tmp_path)
    for said in ("on the same held-out samples", "linear model", "gradient boosting", "yes or no garden", "town (4)"):
        assert said in shown
    run = tmp_path / "run"
    _, report = read(run)
    assert report["test"]["r2"] > 0.9
    assert report["baselines"]["linear model"]["r2"] > 0.9
    page = (run / "report.html").read_text()
    for title in ("Predicted against true", "Residuals", "On the same samples"):
        assert title in page
    assert (run / "model" / "table.json").is_file()
    assert (run / "model" / "README.md").is_file()

    capsys.readouterr()
    row = dict(zip(COLUMNS, ROWS[0], strict=True))
    assert toolkit(["predict", str(run), json.dumps(row, ensure_ascii=False), "--json"]) == 0
    (answer,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answer["price"] == pytest.approx(ROWS[0][-1], rel=0.35)
    assert toolkit(["predict", str(run), "--file", str(file), "--output", str(tmp_path / "prices.csv")]) == 0
    header, *prices = (tmp_path / "prices.csv").read_text().splitlines()
    assert header == "price"
    assert float(prices[0]) == pytest.approx(answer["price"], rel=1e-4)  # as JSON and as CSV
    assert len(prices) == len(ROWS)
    assert toolkit(["predict", str(run), json.dumps(row | {"town": "Paris", "area": None}), "--json"]) == 0
    capsys.readouterr()
    for wrong, said in (
        (row | {"area": "large"}, "row 1: 'area' is 'large', not a number"),
        ({k: v for k, v in row.items() if k != "area"}, "row 1 has no 'area'"),
        (row | {"area": [1]}, "row 1: 'area': [1] is a list"),
    ):
        assert toolkit(["predict", str(run), json.dumps(wrong)]) == 2
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert toolkit(["predict", str(run), json.dumps(row), "--top", "3"]) == 2


def test_classes_and_folds(job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data.target", "town", "--data.drop", "price", "--data.folds", "4", "--data.fold", "1"]
    shown = train(1, [*job, *options, "--train.label_smoothing", "0.1", "--baselines", "on"], tmp_path)
    assert "the test is fold 1 of 4" in shown
    _, report = read(tmp_path / "run")
    assert {"accuracy", "macro_f1"} <= set(report["test"])
    assert {"accuracy", "macro_f1"} <= set(report["baselines"]["gradient boosting"])
    assert report["majority"] == pytest.approx(0.25, abs=0.02)
    capsys.readouterr()
    row = dict(zip(COLUMNS, ROWS[0], strict=True))
    assert toolkit(["predict", str(tmp_path / "run"), json.dumps(row), "--json", "--top", "2"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert next(iter(answer["scores"])) == answer["town"]
    assert len(answer["scores"]) == 2


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(job: list[str], tmp_path: Path) -> None:
    train(1, [*job, "--model.dropout", "0.1"], tmp_path / "whole")
    train(1, [*job, "--model.dropout", "0.1", "--train.steps", "4"], tmp_path / "parts")
    train(1, [*job, "--model.dropout", "0.1", "--checkpoint.allow_change", "train.steps"], tmp_path / "parts")
    (whole, report), (parts, its_report) = (read(tmp_path / name / "run") for name in ("whole", "parts"))
    # The schedule of the first part was that of a shorter run.
    assert [line["units"] for line in parts] == [line["units"] for line in whole]
    assert parts[-1]["samples_seen"] == whole[-1]["samples_seen"]
    assert its_report["before"] == report["before"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.target", "prize"], "has no column 'prize'"),
        (["--train.label_smoothing", "0.1"], "--train.label_smoothing has no effect on the task TableRegression"),
        (["--model.heads", "2"], "--model.heads has no effect on --model.architecture mlp"),
        (["--run.show", "2"], "--run.show has no effect on the recipe tabular"),
        (["--data.numeric", "town"], "column 'town' is to be a number in each row, and no word of it is one"),
    ],
)
def test_what_is_refused(options: list[str], said: str, job: list[str], tmp_path: Path) -> None:
    text = learn("tabular", 1, [*job, *options], tmp_path, 2)
    assert said in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_the_real_launcher(job: list[str], tmp_path: Path) -> None:
    done = launch(job, config="cpu2", cwd=tmp_path, name="tabular")
    assert done.returncode == 0, done.stdout
    _, report = read(tmp_path / "run")
    assert report["status"] == "finished"


def test_every_configuration_is_valid() -> None:
    from recipes.tabular import Config

    files = sorted((ROOT / "configs" / "tabular").glob("*.yaml"))
    assert files
    for path in files:
        assert from_yaml(Config, path) != Config()
