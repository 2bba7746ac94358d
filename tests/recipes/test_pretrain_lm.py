"""A language model from plain text: trained, measured, gone on with, let write; and what is refused."""

from __future__ import annotations

import csv
import functools
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.launching import assert_same_curve, learn, read
from toolkit.checkpoint.account import account
from toolkit.cli import main as toolkit

STEPS = 12
PLACES = [("single", 1), ("ddp", 2), ("fsdp", 2), ("zero3", 2)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of few words, in two scripts: something that a tiny network can learn."""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    rng = random.Random(0)
    who, does = ["The bank", "The team", "市场", "A singer"], ["won", "lost", "上涨", "opened"]
    with path.open("w", encoding="utf-8") as file:
        for number in range(240):
            sentences = [
                f"{rng.choice(who)} {rng.choice(does)} in {rng.choice('春夏秋冬')}." for _ in range(rng.randint(1, 9))
            ]
            file.write(json.dumps({"text": f"No. {number}: " + " ".join(sentences)}, ensure_ascii=False) + "\n")
    return path


@pytest.fixture
def job(corpus: Path) -> list[str]:
    """Options of a run that takes seconds."""
    return [
        *("--model.layers", "2", "--model.hidden_size", "32", "--model.heads", "4", "--model.kv_heads", "2"),
        *("--data.name", str(corpus), "--data.max_length", "64", "--tokenizer.vocabulary", "400"),
        *("--train.global_batch", "8", "--train.steps", str(STEPS), "--train.micro_batch", "4"),
        *("--optim.schedule", "constant", "--optim.final_share", "None", "--optim.warmup_steps", "2"),
        *("--optim.lr", "4e-3", "--generate.tokens", "6", "--generate.prompts", "The bank", "市场"),
        *("--precision", "fp32", "--run.eval_every", "6", "--run.dir", "run"),
    ]


train = functools.partial(learn, "pretrain_lm")


@pytest.fixture(scope="module")
def runs() -> dict[str, Path]:
    return {}


@pytest.mark.parametrize(("strategy", "ranks"), PLACES, ids=[name for name, _ in PLACES])
def test_the_same_numbers_everywhere(
    strategy: str, ranks: int, job: list[str], tmp_path: Path, runs: dict[str, Path]
) -> None:
    options = [*job, "--strategy.name", strategy] + (["--train.micro_batch", "2"] if ranks == 2 else [])
    shown = train(ranks, options, tmp_path)
    run = runs[strategy] = tmp_path / "run"
    metrics, report = read(run)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert report["status"] == "finished"
    before, after = report["before"], report["test"]
    assert after["perplexity"] < before["perplexity"] / 2
    assert 0 < after["bits_per_byte"] < before["bits_per_byte"]
    assert [(line["step"], line["prompt"]) for line in report["texts"]] == [
        (step, prompt) for step in (0, 6, 12) for prompt in ("The bank", "市场")
    ]
    assert account(run).sound
    for said in ("bits per byte", "perplexity", "never whole", "padding", "filled to", "toolkit predict run"):
        assert said in shown
    if strategy != "single":
        alone, alone_report = read(runs["single"])
        assert_same_curve(metrics, alone)
        assert [line["text"] for line in report["texts"]] == [line["text"] for line in alone_report["texts"]]
        for figure in ("loss", "perplexity", "bits_per_byte"):
            assert after[figure] == pytest.approx(alone_report["test"][figure], rel=1e-4)


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(job: list[str], tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    train(1, job, tmp_path / "whole")
    train(1, [*job, "--train.steps", "6"], tmp_path)
    shown = train(1, [*job, "--checkpoint.allow_change", "train.steps"], tmp_path)
    assert "after step 6" in shown
    (whole, whole_report), (metrics, report) = read(tmp_path / "whole" / "run"), read(tmp_path / "run")
    for figure in ("loss", "grad_norm", "units", "lr"):
        assert [line[figure] for line in metrics] == [line[figure] for line in whole]
    assert report["texts"] == whole_report["texts"]
    assert report["test"] == whole_report["test"]
    one, other = (
        AutoModelForCausalLM.from_pretrained(path / "run" / "model") for path in (tmp_path, tmp_path / "whole")
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_saved_model_goes_on_and_has_the_loss_that_was_reported(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(1, job, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.decode(tokenizer("市场 opened")["input_ids"]) == "市场 opened"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    test = read(tmp_path / "run")[1]["test"]

    # The weights go on where they are, with their own tokenizer and sizes.
    sizes = job.index("--data.name")
    vocabulary = job.index("--tokenizer.vocabulary")
    more = [*job[sizes:vocabulary], *job[vocabulary + 2 :], "--model.name", str(tmp_path / "run" / "model")]
    train(1, [*more, "--run.dir", "more", "--train.steps", "4", "--run.eval_every", "4"], tmp_path)
    again = read(tmp_path / "more")[1]["before"]
    assert again["loss"] == pytest.approx(test["loss"], rel=1e-5)
    assert again["units"] == test["units"]

    # Or an adapter does, on them, which then writes, or becomes part of them.
    lora = ["--adapter.name", "lora", "--adapter.targets", "all-linear", "--adapter.rank", "4", "--precision", "bf16"]
    train(2, [*more, *lora, "--run.dir", "lora", "--strategy.name", "fsdp"], tmp_path)
    report = read(tmp_path / "lora")[1]
    assert report["plan"]["model"]["logits"] == "never whole"
    assert report["test"]["loss"] < report["before"]["loss"] == pytest.approx(test["loss"], rel=1e-2)
    assert toolkit(["merge", str(tmp_path / "lora")]) == 0
    capsys.readouterr()
    written = []
    for folder in ("lora", "lora/merged"):
        assert toolkit(["predict", str(tmp_path / folder), "The team", "--tokens", "5", "--temperature", "0"]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1] != ""

    # It writes.
    run = str(tmp_path / "run")
    assert toolkit(["predict", run, "The bank", "市场", "--tokens", "8", "--temperature", "0", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["The bank", "市场"]
    greedy = model.generate(torch.tensor([[0, *tokenizer("The bank")["input_ids"]]]), max_new_tokens=8, do_sample=False)
    assert lines[0]["continuation"] == tokenizer.decode(
        greedy[0, 1 + len(tokenizer("The bank")["input_ids"]) :], skip_special_tokens=True
    )
    assert toolkit(["predict", run, "A singer", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("A singer")
    (tmp_path / "prompts.txt").write_text("The team\n市场\n", encoding="utf-8")
    files = ["--file", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out.csv")]
    assert toolkit(["predict", run, *files, "--tokens", "5"]) == 0
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == ["The team", "市场"]
    for options, said in (
        (["--top", "2"], "--top has no effect on a language model"),
        (["--tokens", "100"], "beyond the 64 that the model was made for"),
    ):
        assert toolkit(["predict", run, "The bank", *options]) == 2
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_mixture_is_gone_through_once_an_epoch(job: list[str], corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"Line {number} is a verse." for number in range(60)), encoding="utf-8")
    options = ["--data.name", str(corpus), str(other), "--data.weights", "2", "1", "--data.texts_in", "line"]
    shown = train(2, [*job, *options, "--train.steps", "None", "--train.epochs", "2"], tmp_path)
    found = account(tmp_path / "run")
    assert found.sound
    assert found.epochs == 2
    passes = read(tmp_path / "run")[1]["data"]["passes"]
    assert passes[0] == 1
    assert passes[1] > 1
    assert f"({passes[1]:.2f}timesanepoch)" in "".join(shown.split())


def test_what_is_cleaned_away_is_told(job: list[str], tmp_path: Path) -> None:
    """Of 240 texts 5 nearly repeat another one, 4 are in French, 3 too short, and 2 quote a text of the test."""
    rng = random.Random(1)
    nouns = [f"{first}{second}" for first in ("note", "plan", "road", "tree") for second in range(400)]
    sentence = "The {} said that the {} would see the {} before it was with the {}."
    texts = [" ".join(sentence.format(*rng.sample(nouns, 4)) for _ in range(6)) for _ in range(228)]
    held = [
        f"It was said of {noun} by all of the people here that they would like it. {noun} it is." for noun in nouns[:9]
    ]
    french = "Le gouvernement a déclaré qu'il publierait son rapport sur l'économie avant la fin de la semaine {}."
    texts[-2:] = [f"{text} {held[i]}" for i, text in enumerate(texts[-2:])]
    texts += [text + " Again!" for text in texts[:5]] + [french.format(number) for number in range(4)]
    texts += ["Too short.", "So is this.", "短"]
    for name, rows in (("train", texts), ("test", held)):
        lines = [json.dumps({"text": text}) + "\n" for text in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    options = ["--data.name", "train.jsonl", "--data.test", "test.jsonl", "--data.near_duplicates", "0.8"]
    options += ["--data.languages", "en", "zh", "--data.min_chars", "20", "--data.decontaminate", "13"]
    shown = train(2, [*job, *options, "--train.steps", "3", "--run.eval_every", "3"], tmp_path)
    report = read(tmp_path / "run")[1]
    assert {reason: count for reason, count in report["data"]["dropped"].items() if count} == {
        "of too few characters": 3,
        "in another language": 4,
        "nearly repeated": 5,
        "sharing 13 words with a held-out split": 2,
    }
    assert report["data"]["languages"]["fr"] == 4
    assert report["data"]["texts"]["test"] == 9
    for told in ("3 of too few characters", "4 in another language", "5 nearly repeated"):
        assert told in " ".join(shown.replace("│", " ").split())
    assert "5 nearly repeated" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_other_networks(architecture: str, job: list[str], tmp_path: Path) -> None:
    kv = job.index("--model.kv_heads")
    options = [*job[:kv], *job[kv + 2 :], "--model.architecture", architecture, "--train.steps", "6"]
    train(1, options, tmp_path)
    report = read(tmp_path / "run")[1]
    assert report["test"]["loss"] < report["before"]["loss"]
    assert report["plan"]["training"]["padding"] == "none"
    assert report["plan"]["model"]["logits"] == "never whole"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.heads", "3"], "do not go together"),
        (["--model.architecture", "gpt2"], "--model.kv_heads has no effect"),
        (["--model.revision", "main"], "--model.revision has no effect"),
        (["--model.name", "sample:minilm"], "--tokenizer.vocabulary has no effect"),
        (["--model.name", "sample:minilm", "--tokenizer.vocabulary", "8192"], "the tokenizer has no end token"),
        (["--data.weights", "1"], "--data.weights has no effect on one source"),
        (["--tokenizer.name", "sample:minilm"], "--tokenizer.vocabulary has no effect"),
        (["--tokenizer.vocabulary", "20"], "greater than or equal to 260"),
        (["--model.architecture", "mamba"], "gpt2"),
        (["--adapter.name", "lora"], "would freeze random weights"),
        (["--train.label_smoothing", "0.1"], "--train.label_smoothing has no effect"),
        (["--data.text", "body"], "has no column 'body'"),
        (["--data.languages", "english"], "'english' is no language that can be told"),
        (["--data.near_duplicates", "0.8", "--data.deduplicate", "False"], "contradicts --data.deduplicate False"),
        (["--data.near_duplicates", "80"], "less than or equal to 1"),
        (["--model.freeze", "nothing"], "matches no parameter"),
    ],
)
def test_what_is_refused(options: list[str], said: str, job: list[str], tmp_path: Path) -> None:
    text = learn("pretrain_lm", 1, [*job, *options], tmp_path, 2)
    assert said in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()
