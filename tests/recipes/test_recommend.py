"""The next item: the same numbers everywhere, answers, and what is refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.recipes.launching import assert_same_curve, learn, read
from tests.tables import plays, write_csv
from toolkit.checkpoint.account import account
from toolkit.cli import main as toolkit


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [[*row, f"Film {row[1][1:]}"] for row in plays(80, 25)]
    return write_csv(tmp_path_factory.mktemp("events") / "plays.csv", ("who", "what", "when", "name"), rows)


@pytest.fixture
def job(file: Path) -> list[str]:
    return [
        *("--data.name", str(file), "--data.user", "who", "--data.item", "what", "--data.timestamp", "when"),
        *("--data.title", "name", "--data.max_length", "16", "--data.exclude_seen", "False"),
        *("--model.hidden_size", "16", "--model.dropout", "0"),
        *("--train.global_batch", "24", "--train.steps", "8", "--optim.lr", "1e-2"),
        *("--run.dir", "run", "--run.log_every", "1"),
    ]


train = functools.partial(learn, "recommend")


def test_the_same_numbers_everywhere(job: list[str], tmp_path: Path) -> None:
    train(1, job, tmp_path / "single")
    metrics, report = read(tmp_path / "single" / "run")
    for strategy in ("ddp", "fsdp", "zero2"):
        train(2, [*job, "--strategy.name", strategy], tmp_path / strategy)
        shared, its_report = read(tmp_path / strategy / "run")
        assert_same_curve(shared, metrics)
        assert its_report["test"]["popularity"] == report["test"]["popularity"]
        for figure in ("hit_rate_at_10", "ndcg_at_10", "mrr", "loss"):
            assert its_report["test"][figure] == pytest.approx(report["test"][figure], rel=1e-5)
        assert account(tmp_path / strategy / "run").sound


def test_it_learns_what_follows_and_answers(job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = train(1, [*job, "--train.steps", "150", "--run.eval_every", "150"], tmp_path)
    for said in ("on the same held-out samples", "popularity", "the last item of each user is the test", "never whole"):
        assert said in shown
    run = tmp_path / "run"
    _, report = read(run)
    assert report["test"]["hit_rate_at_10"] > report["baselines"]["popularity"]["hit_rate_at_10"] + 0.2
    assert report["test"]["mrr"] > 0.5
    capsys.readouterr()
    asked = json.dumps({"items": ["i3", "i4", "i5"]})
    assert toolkit(["predict", str(run), asked, "--json", "--top", "3"]) == 0
    (answer,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(answer["items"]), answer["items"][0]["item"], answer["items"][0]["title"]] == [3, "i6", "Film 6"]
    for wrong, said in (
        ({"items": ["i3", "i99"]}, "row 1: there is no item 'i99'"),
        ({"songs": ["i3"]}, "row 1 has no list of items under 'items'"),
    ):
        assert toolkit(["predict", str(run), json.dumps(wrong)]) == 2
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.item", "song"], "has no column 'song'"),
        (["--data.timestamp", "what"], "holds neither numbers nor dates"),
        (["--model.heads", "3"], "--model.hidden_size 16 cannot be shared by 3 heads"),
    ],
)
def test_what_is_refused(options: list[str], said: str, job: list[str], tmp_path: Path) -> None:
    text = learn("recommend", 1, [*job, *options], tmp_path, 2)
    assert said in text
    assert "Traceback" not in text
