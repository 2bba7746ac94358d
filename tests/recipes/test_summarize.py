"""Summaries by a chat model: the same numbers and texts everywhere, the lead sentence beside them, prediction."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.chats import save_chat_model
from tests.pairs import write_pairs
from tests.recipes.launching import assert_same_curve, learn, read
from toolkit.cli import main as toolkit

STEPS = 6


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("summaries")
    return [
        *("--model.name", str(save_chat_model(folder / "model")), "--adapter.targets", "all-linear"),
        *("--data.name", str(write_pairs(folder / "pairs.jsonl")), "--data.instruction", "In Chinese."),
        *("--data.validation_share", "0.1", "--data.test_share", "0.1", "--data.train_texts", "None"),
        *("--data.max_length", "24", "--data.max_target_length", "20", "--generate.show", "2"),
        *("--train.global_batch", "8", "--train.steps", str(STEPS), "--train.micro_batch", "4"),
        *("--optim.lr", "1e-2", "--optim.schedule", "constant", "--precision", "fp32", "--train.eval_batch", "5"),
        *("--run.eval_every", "3", "--run.dir", "run"),
    ]


train = functools.partial(learn, "summarize")


@pytest.fixture(scope="module")
def alone(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train(1, job, folder)
    return folder / "run"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_the_same_numbers_and_texts_everywhere(strategy: str, job: list[str], alone: Path, tmp_path: Path) -> None:
    expected, expected_report = read(alone)
    train(2, [*job, "--train.micro_batch", "2", "--strategy.name", strategy], tmp_path)
    metrics, report = read(tmp_path / "run")
    assert_same_curve(metrics, expected)
    assert report["texts"] == expected_report["texts"]
    for figure in ("rouge1", "rouge2", "rougeL", "loss"):
        assert report["test"][figure] == pytest.approx(expected_report["test"][figure], rel=1e-5)


def test_it_learns_and_predicts_what_was_tested(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--adapter.name", "none", "--adapter.targets", "auto", "--optim.lr", "5e-3"]
    shown = train(1, [*job, *options, "--train.steps", "120", "--run.eval_every", "120"], tmp_path)
    _, report = read(tmp_path / "run")
    assert report["before"]["rouge1"] < 0.1
    assert report["test"]["rouge1"] > 0.4
    assert report["baselines"]["lead sentence"]["rouge1"] < 0.1  # which is English
    for said in ("ROUGE-L", "lead sentence", "wanted:"):
        assert said in shown
    tested = [line for line in report["texts"] if line["step"] == 120]
    capsys.readouterr()
    prompts = [line["prompt"] for line in tested]
    assert toolkit(["predict", str(tmp_path / "run"), *prompts, "--temperature", "0", "--tokens", "20", "--json"]) == 0
    found = [json.loads(line)["answer"].strip() for line in capsys.readouterr().out.splitlines()]
    assert found == [line["text"] for line in tested]


def test_what_is_refused(job: list[str], tmp_path: Path) -> None:
    for options, said in (
        (["--model.name", "sample:minilm"], "the tokenizer has no chat template"),
        (["--data.target", "summary"], "their column 'summary' is missing or empty"),
        (["--generate.length_penalty", "2"], "no effect on one beam"),
    ):
        text = learn("summarize", 1, [*job, *options], tmp_path, 2)
        assert said in text
        assert not (tmp_path / "run").exists()
