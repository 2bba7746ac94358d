"""Sentence embeddings: the same numbers everywhere, pairs that come to be found, vectors, and what is refused."""

from __future__ import annotations

import functools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.recipes.conftest import COMMON, WORDS
from tests.recipes.launching import assert_same_curve, learn, read
from toolkit.checkpoint.account import account
from toolkit.cli import main as toolkit

STEPS = 6
FIGURES = ("loss", "recall_at_1", "recall_at_10", "mrr")
CASES = [
    pytest.param(strategy, micro, marks=() if strategy in ("ddp", "fsdp") else pytest.mark.slow)
    for strategy, micro in (("ddp", 2), ("fsdp", 6), ("zero1", 3), ("zero2", 2), ("zero3", 3))
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three words in an order of its own on each side, among others; some with a text that is not to be found."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rng, words = random.Random(0), [word for of_topic in WORDS.values() for word in of_topic]
    rows = []
    for number in range(140):
        chosen = rng.sample(words, 3)
        anchor, positive = (rng.sample(chosen, 3) + rng.choices(COMMON, k=rng.randint(1, 6)) for _ in range(2))
        row = {"question": " ".join(anchor), "answer": " ".join(positive)}
        if number % 4 == 0:
            row["other"] = " ".join(rng.sample(words, 3))
        if number % 10 == 9:
            row["answer"] = rows[-1]["answer"]  # two questions with one answer
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def job(pairs: Path, tiny_model: Path) -> list[str]:
    return [
        *("--model.name", str(tiny_model), "--model.init", "random", "--model.dropout", "0"),
        *("--data.name", str(pairs), "--data.pair", "columns", "--data.anchor", "question"),
        *("--data.positive", "answer", "--data.negative", "other", "--data.max_length", "32"),
        *("--train.global_batch", "24", "--train.steps", str(STEPS), "--train.eval_batch", "8"),
        *(
            "--optim.lr",
            "1e-2",
            "--optim.schedule",
            "constant",
            "--precision",
            "fp32",
            "--run.eval_every",
            "3",
            "--run.dir",
            "run",
        ),
    ]


train = functools.partial(learn, "embed")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture
def reference(job: list[str], alone: Path) -> Path:
    """One process, the whole batch in one micro-batch."""
    if not (alone / "run").exists():
        shown = train(1, [*job, "--train.micro_batch", "24"], alone)
        assert "InfoNCE over the whole global batch" in shown
        assert "recall@10" in shown
    return alone / "run"


@pytest.mark.parametrize(("strategy", "micro"), CASES)
def test_the_same_numbers_everywhere(
    strategy: str, micro: int, job: list[str], reference: Path, tmp_path: Path
) -> None:
    expected, expected_report = read(reference)
    train(2, [*job, "--train.micro_batch", str(micro), "--strategy.name", strategy], tmp_path)
    metrics, report = read(tmp_path / "run")
    assert_same_curve(metrics, expected, absolute=1e-6)
    assert any(line["units"] < 24 for line in expected)  # an epoch ends with a batch that is not full
    for when in ("before", "test"):
        for figure in FIGURES:
            assert report[when][figure] == pytest.approx(expected_report[when][figure], rel=1e-5, abs=1e-6), figure
    assert account(tmp_path / "run").sound


def test_pairs_come_to_be_found(reference: Path) -> None:
    _, report = read(reference)
    assert report["test"]["mrr"] > report["before"]["mrr"] + 0.1
    assert report["test"]["loss"] < report["before"]["loss"]
    card = (reference / "model" / "README.md").read_text()
    assert "| Recall@1 |" in card
    assert "InfoNCE" in card
    assert "Recall@1" in (reference / "report.html").read_text()


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(job: list[str], reference: Path, tmp_path: Path) -> None:
    whole = ["--train.micro_batch", "24"]
    train(1, [*job, *whole, "--train.steps", "3"], tmp_path)
    train(1, [*job, *whole, "--checkpoint.allow_change", "train.steps"], tmp_path)
    expected, expected_report = read(reference)
    metrics, report = read(tmp_path / "run")
    assert len(expected) == STEPS
    for figure in ("loss", "grad_norm", "units"):
        assert [line[figure] for line in metrics] == [line[figure] for line in expected]
    assert report["test"] == expected_report["test"]


def test_predict_gives_vectors(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["goal team the", "team goal a", "album song in"]
    assert toolkit(["predict", str(reference), *texts, "--json", "--batch", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == texts
    vectors = torch.tensor([row["vector"] for row in rows])
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert [row["similarity"] for row in rows] == pytest.approx((vectors @ vectors[0]).tolist(), abs=1e-5)
    assert rows[0]["similarity"] > rows[1]["similarity"] > rows[2]["similarity"]

    folder = reference / "model"  # as transformers alone would do it
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = tokenizer(texts[:1], return_tensors="pt")
    states = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    plain = torch.nn.functional.normalize(states.mean(1), dim=-1)
    torch.testing.assert_close(plain[0].detach(), vectors[0], rtol=0, atol=1e-5)

    assert toolkit(["predict", str(reference), *texts[:2]]) == 0
    assert f"{rows[1]['similarity']:.4f} to the first; 32 numbers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (
            {"answer": ""},
            ["--data.max_bad_rows", "0"],
            "row 3 of",
        ),
        ({"answer": "same", "question": "same"}, ["--data.max_bad_rows", "0"], "two of their texts are the same"),
        ({}, ["--data.positive", "reply"], "column 'reply' is missing"),
        ({}, ["--data.pair", "headline", "--data.text", "answer"], "leaves nothing behind a headline"),
        ({}, ["--train.label_smoothing", "0.1"], "--train.label_smoothing has no effect"),
        ({}, ["--contrast.temperature", "0"], "contrast.temperature"),
    ],
)
def test_what_is_refused(
    change: dict[str, str], options: list[str], said: str, job: list[str], pairs: Path, tmp_path: Path
) -> None:
    lines = pairs.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    shown = train(1, [*job, "--data.name", str(tmp_path / "pairs.jsonl"), *options], tmp_path, code=2)
    assert said in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


def test_pairs_of_one_text() -> None:
    from toolkit.data.anchors import _halves, _headline

    assert _headline("一条新闻\n\n第一段。\n第二段。") == {"anchor": "一条新闻", "positive": "第一段。\n第二段。"}
    assert _halves("甲乙丙。丁戊己！庚辛") == {"anchor": "甲乙丙。", "positive": "丁戊己！庚辛"}
    assert _halves("It cost 3.5 pounds. So they left.") == {
        "anchor": "It cost 3.5 pounds.",
        "positive": "So they left.",
    }


def test_a_damaged_model_is_told(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(reference / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["pooling"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert toolkit(["predict", str(tmp_path / "model"), "a text"]) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "does not say how the vector of a text is made" in said
