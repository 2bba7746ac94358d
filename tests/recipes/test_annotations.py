"""Tags, spans, pairs, labels, numbers: the same on one process and on two, and what a run leaves answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.conftest import COMMON, WORDS
from tests.recipes.launching import ROOT, assert_same_curve, launch, learn, read
from toolkit.checkpoint.account import account
from toolkit.cli import main as toolkit
from toolkit.config import from_yaml

KINDS = list(WORDS)
STEPS = 6


def sentences(count: int) -> Iterator[tuple[list[str], list[str]]]:
    """Words with tags: names are of one or two words of a kind."""
    draw = random.Random(0)
    for _ in range(count):
        words, tags = [], []
        for _ in range(draw.randint(1, 4)):
            kind, length = draw.choice(KINDS), draw.randint(1, 2)
            between = draw.choices(COMMON, k=draw.randint(1, 2))  # or nothing would tell two names from a longer one
            words += [*draw.choices(WORDS[kind], k=length), *between]
            tags += [f"B-{kind}", f"I-{kind}"][:length] + ["O"] * len(between)
        yield words, tags


def tags(folder: Path) -> list[str]:
    lines = ["-DOCSTART- -X- O", ""]
    for words, marks in sentences(80):
        lines += [*(f"{word} X {mark}" for word, mark in zip(words, marks, strict=True)), ""]
    (folder / "tags.conll").write_text("\n".join(lines), encoding="utf-8")
    return ["--data.name", str(folder / "tags.conll"), "--data.max_length", "16"]


def spans(folder: Path) -> list[str]:
    draw = random.Random(0)
    with (folder / "spans.jsonl").open("w", encoding="utf-8") as out:
        for _ in range(60):
            kind = draw.choice(KINDS)
            answer = " ".join(draw.choices(WORDS[kind], k=2))
            before, after = (draw.choices(COMMON, k=draw.randint(3, 40)) for _ in range(2))
            passage = f"{' '.join(before)} {answer} {' '.join(after)}"
            out.write(
                json.dumps({"question": f"new {draw.choice(COMMON)}", "passage": passage, "answers": answer}) + "\n"
            )
    return ["--data.name", str(folder / "spans.jsonl"), "--data.max_length", "32", "--data.stride", "8"]


def texts(folder: Path, label: Callable[[list[str], random.Random], Any]) -> list[str]:
    draw = random.Random(0)
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as out:
        for words, marks in sentences(80):
            row = {"text": " ".join(words), "other": draw.choice(COMMON), "label": label(marks, draw)}
            out.write(json.dumps(row) + "\n")
    return ["--data.name", str(folder / "texts.jsonl"), "--data.max_length", "32"]


def pairs(folder: Path) -> list[str]:
    return [*texts(folder, lambda marks, draw: draw.choice(["yes", "no"])), "--data.text_pair", "other"]


def labels(folder: Path) -> list[str]:
    found = texts(folder, lambda marks, draw: sorted({mark[2:] for mark in marks} - {""}))
    return [*found, "--data.target", "labels"]


def numbers(folder: Path) -> list[str]:
    return [*texts(folder, lambda marks, draw: sum(mark != "O" for mark in marks) / 4), "--data.target", "number"]


JOBS = {
    "tags": ("token_cls", tags, {"entity_f1", "entity_precision", "entity_recall"}),
    "spans": ("qa", spans, {"exact_match", "token_f1"}),
    "pairs": ("bert_cls", pairs, {"accuracy", "macro_f1"}),
    "labels": ("bert_cls", labels, {"micro_f1", "macro_f1"}),
    "numbers": ("bert_cls", numbers, {"pearson", "spearman", "mae", "r2"}),
}


@pytest.fixture
def job(tiny_model: Path) -> list[str]:
    return [
        *("--model.name", str(tiny_model), "--model.init", "random", "--model.dropout", "0"),
        *("--data.validation_share", "0.1", "--data.test_share", "0.2"),
        *("--train.global_batch", "12", "--train.micro_batch", "3", "--train.steps", str(STEPS)),
        *("--optim.lr", "1e-3", "--precision", "fp32", "--run.dir", "run"),
    ]


def answers(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert toolkit(["predict", *words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("what", JOBS)
def test_the_same_numbers_everywhere(what: str, job: list[str], tmp_path: Path) -> None:
    name, write, figures = JOBS[what]
    options = [*job, *write(tmp_path)]
    shown = learn(name, 1, [*options, "--train.padding_free", "on", "--run.dir", "alone"], tmp_path)
    expected, expected_report = read(tmp_path / "alone")
    assert figures <= set(expected_report["test"])
    assert "toolkit predict alone" in shown
    for strategy in ("ddp", "fsdp"):
        run = tmp_path / strategy
        learn(name, 2, [*options, "--strategy.name", strategy, "--run.dir", str(run)], tmp_path)
        metrics, report = read(run)
        assert_same_curve(metrics, expected)
        for figure in (*figures, "loss"):
            assert report["before"][figure] == pytest.approx(expected_report["before"][figure], rel=1e-5, abs=1e-9)
            assert report["test"][figure] == pytest.approx(expected_report["test"][figure], rel=1e-5, abs=1e-9)
        assert account(run).sound


def test_tags_are_learnt_and_marked(job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*job, *tags(tmp_path), "--train.steps", "200", "--optim.lr", "3e-3"]
    learn("token_cls", 1, [*options, "--run.eval_every", "200"], tmp_path)
    _, report = read(tmp_path / "run")
    assert report["test"]["entity_f1"] > report["before"]["entity_f1"] + 0.4
    (found,) = answers(capsys, str(tmp_path / "run"), "the striker said in a market")
    names = {found["text"][name["start"] : name["end"]]: name["label"] for name in found["entities"]}
    assert names == {name["text"]: name["label"] for name in found["entities"]}
    assert names.get("striker") == "sport"
    (longer,) = answers(capsys, str(tmp_path / "run"), "the striker said in a market " * 20)
    assert sum(name["text"] == "striker" for name in longer["entities"]) > 15, "it is read in pieces"
    assert toolkit(["predict", str(tmp_path / "run"), "the striker said"]) == 0
    assert "[striker sport]" in capsys.readouterr().out


def test_answers_are_learnt_and_found(job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*job, *spans(tmp_path), "--train.steps", "120", "--optim.lr", "5e-3"]
    learn("qa", 1, [*options, "--run.eval_every", "120"], tmp_path)
    _, report = read(tmp_path / "run")
    assert report["test"]["token_f1"] > report["before"]["token_f1"] + 0.3
    passage = "the a of in and album song this year new said big week"
    (found,) = answers(capsys, str(tmp_path / "run"), json.dumps({"question": "new a", "passage": passage}))
    assert passage[found["start"] : found["end"]] == found["answer"]
    assert "album" in found["answer"] or "song" in found["answer"]
    assert toolkit(["predict", str(tmp_path / "run"), '{"question": "new"}']) == 2
    assert "has no text in a column 'passage'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("what", ["pairs", "labels", "numbers"])
def test_other_classifiers_answer(
    what: str, job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn("bert_cls", 1, [*job, *JOBS[what][1](tmp_path)], tmp_path)
    run = str(tmp_path / "run")
    if what == "pairs":
        (found,) = answers(capsys, run, '{"text": "match goal", "other": "big", "more": 1}')
        assert found == {"text": "match goal", "other": "big", "label": found["label"], "score": found["score"]} | {
            "scores": found["scores"]
        }
        assert sum(found["scores"].values()) == pytest.approx(1, abs=1e-5)
        return
    (found,) = answers(capsys, run, "match goal")
    if what == "labels":
        assert found["labels"] == [label for label, score in found["scores"].items() if score >= 0.5]
        assert set(found["scores"]) == set(KINDS)
    else:
        assert set(found) == {"text", "value"}
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["problem_type"] == {"labels": "multi_label_classification", "numbers": "regression"}[what]


@pytest.mark.parametrize("what", ["tags", "spans"])
def test_launch_and_go_on(what: str, job: list[str], tmp_path: Path) -> None:
    """Through the real launcher on two processes; then on, with the same figures as in one go."""
    name, write, _ = JOBS[what]
    options = [*job, *write(tmp_path), "--optim.schedule", "constant", "--optim.warmup_steps", "0"]
    learn(name, 2, [*options, "--run.dir", "whole"], tmp_path)
    done = launch([*options, "--train.steps", "3"], config="cpu2", cwd=tmp_path, name=name)
    assert done.returncode == 0, done.stdout
    learn(name, 2, [*options, "--checkpoint.allow_change", "train.steps"], tmp_path)
    (metrics, report), (expected, expected_report) = read(tmp_path / "run"), read(tmp_path / "whole")
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in expected], rel=1e-5)
    assert report["test"]["loss"] == pytest.approx(expected_report["test"]["loss"], rel=1e-5)
    assert account(tmp_path / "run").sound


FAULTS = {
    "one column": ("token_cls", "tags.conll", "EU\nrejects\n\n", "line 1 has one column only: 'EU'"),
    "no tags": ("token_cls", "tags.conll", "EU NNP\n\n", "the tag 'NNP' is neither O nor one like B-PER"),
    "unlike": ("token_cls", "tags.jsonl", '{"tokens": ["EU"], "tags": ["O", "O"]}\n', "they have 1 tokens and 2 tags"),
    "numbers": ("token_cls", "tags.jsonl", '{"tokens": ["EU"], "tags": [3]}\n', "write the names of the tags"),
    "no names": ("token_cls", "tags.conll", "".join(f"{word} O\n\n" for word in COMMON), "no token of the training"),
    "absent": (
        "qa",
        "spans.jsonl",
        '{"question": "a", "passage": "b", "answers": "c"}\n',
        "none of their answers",
    ),
    "column": ("qa", "spans.jsonl", '{"question": "a", "context": "b"}\n', "they have no column 'passage'"),
    "texts": ("qa", "spans.txt", "a\n", "is of no kind that can be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_told_with_file_and_row(fault: str, job: list[str], tmp_path: Path) -> None:
    name, file, content, reason = FAULTS[fault]
    (tmp_path / file).write_text(content, encoding="utf-8")
    options = [*job, "--data.name", file, "--data.max_bad_rows", "0"]
    text = learn(name, 1, options, tmp_path, 2)
    told = text
    assert reason in told
    assert fault in ("no names", "texts") or f"row 1 of {file}" in told
    assert not (tmp_path / "run").exists()


def test_every_configuration_is_valid() -> None:
    from recipes.token_cls import Config

    files = sorted((ROOT / "configs" / "token_cls").glob("*.yaml"))
    assert files
    for file in files:
        assert from_yaml(Config, file) != Config()
        header = file.read_text(encoding="utf-8").split("\n\n")[0]
        assert f"--config configs/token_cls/{file.name}" in header
        assert all(word in header for word in ("Hardware:", "Result:"))
