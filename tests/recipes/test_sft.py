"""Instruction tuning: the same numbers everywhere, answers that end, what is exported, and what is refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.chats import ANSWERS, save_chat_model, write_chats
from tests.recipes.conftest import Learnt
from tests.recipes.launching import assert_same_curve, learn, read
from toolkit.checkpoint.account import account
from toolkit.cli import main as toolkit

STEPS = 8
ADAPTERS = {
    "whole": ("--adapter.name", "none"),
    "lora": ("--adapter.name", "lora", "--adapter.targets", "all-linear", "--adapter.rank", "4"),
    "dora": ("--adapter.name", "dora", "--adapter.rank", "4"),
    "nf4": ("--adapter.name", "lora", "--adapter.rank", "4", "--quantization", "nf4"),
    "int8": ("--adapter.name", "lora", "--adapter.rank", "4", "--quantization", "int8"),
}
QUICK = {("lora", "ddp"), ("lora", "fsdp"), ("whole", "zero3"), ("nf4", "fsdp"), ("int8", "zero2")}
CASES = [
    pytest.param(adapter, strategy, marks=() if (adapter, strategy) in QUICK else pytest.mark.slow)
    for adapter in ADAPTERS
    for strategy in ("ddp", "fsdp", "zero2", "zero3")
    if adapter != "int8" or strategy in ("ddp", "zero2")  # see the support matrix
]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder / "chats.jsonl")
    save_chat_model(folder / "model")
    save_chat_model(folder / "base", None)
    return folder


@pytest.fixture
def job(there: Path) -> list[str]:
    return [
        *("--model.name", str(there / "model"), "--data.name", str(there / "chats.jsonl")),
        *("--data.validation_share", "0.1", "--data.test_share", "0.1"),
        *("--train.global_batch", "8", "--train.steps", str(STEPS), "--train.micro_batch", "4"),
        *("--optim.lr", "1e-2", "--optim.schedule", "constant", "--precision", "fp32"),
        *("--generate.tokens", "8", "--generate.prompts", "Who sings?"),
        *("--run.eval_every", "4", "--run.dir", "run"),
    ]


train = functools.partial(learn, "sft")


@pytest.mark.parametrize(("adapter", "strategy"), CASES)
def test_the_same_numbers_everywhere(
    adapter: str,
    strategy: str,
    job: list[str],
    tmp_path: Path,
    alone: Callable[..., Learnt],
) -> None:
    expected, expected_report = alone("sft", *job, *ADAPTERS[adapter])
    train(2, [*job, *ADAPTERS[adapter], "--train.micro_batch", "2", "--strategy.name", strategy], tmp_path)
    metrics, report = read(tmp_path / "run")
    assert_same_curve(metrics, expected)
    assert report["test"]["loss"] == pytest.approx(expected_report["test"]["loss"], rel=1e-5)
    assert report["texts"] == expected_report["texts"]
    assert account(tmp_path / "run").sound


def test_without_padding_and_with_it(job: list[str], tmp_path: Path) -> None:
    for name, options in (("packed", ["--train.padding_free", "on"]), ("padded", ["--train.padding_free", "off"])):
        train(1, [*job, *ADAPTERS["lora"], *options, "--run.dir", name], tmp_path)
    (packed, report), (padded, _) = read(tmp_path / "packed"), read(tmp_path / "padded")
    assert report["plan"]["training"]["padding"] == "none"
    assert_same_curve(packed, padded)


def test_only_answers_count(job: list[str], there: Path, tmp_path: Path) -> None:
    """Each step's units are the tokens of answers and of their ends; the plan tells their share."""
    shown = train(1, [*job, *ADAPTERS["lora"], "--train.steps", "None", "--train.epochs", "1"], tmp_path)
    metrics, report = read(tmp_path / "run")
    assert sum(m["units"] for m in metrics) == report["data"]["learnt"]["train"]
    assert report["data"]["learnt"]["train"] < report["data"]["tokens"]["train"] / 2
    for said in ("all answers, and the token that ends it", "conversations", "lora of rank 4", "never whole"):
        assert said in " ".join(shown.split())
    assert report["test"]["loss"] < report["before"]["loss"]
    assert next(line["step"] for line in report["texts"]) == 0  # an answer before training, to be compared


def test_it_learns_to_answer_and_to_stop(
    job: list[str], there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--train.steps", "120", "--run.eval_every", "60", "--adapter.name", "none", "--optim.lr", "5e-3"]
    train(1, [*job, *options, "--generate.tokens", "20", "--generate.temperature", "0"], tmp_path)
    _, report = read(tmp_path / "run")
    assert report["texts"][-1]["text"] == ANSWERS["Who sings?"]  # and not a token more
    assert report["test"]["loss"] < report["before"]["loss"] / 4

    # What was saved stops of itself, wherever it is loaded.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who sings?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == ANSWERS["Who sings?"] + "<|im_end|>"

    capsys.readouterr()
    run = str(tmp_path / "run")
    assert toolkit(["predict", run, "Who sings?", "天空是什么颜色?", "--temperature", "0", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"text": text, "answer": ANSWERS[text]} for text in ("Who sings?", "天空是什么颜色?")]
    assert toolkit(["predict", run, "Who sings?", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "Who sings?\nA bird sings.\n\n"
    assert toolkit(["predict", run, "A bird", "--plain", "--tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("A bird")


def test_an_adapter_is_loaded_by_peft_and_merged(
    job: list[str], there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(2, [*job, *ADAPTERS["lora"], "--strategy.name", "fsdp"], tmp_path)
    run = tmp_path / "run"
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer.chat_template
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(there / "model"), run / "model")
    assert toolkit(["merge", str(run)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    ids = torch.tensor([tokenizer("Who sings?")["input_ids"]])
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
    capsys.readouterr()
    answers = []
    for folder in (run, run / "merged"):
        assert toolkit(["predict", str(folder), "Who sings?", "--tokens", "6", "--temperature", "0", "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["answer"])
    assert answers[0] == answers[1]


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(job: list[str], tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    lora = ADAPTERS["lora"]
    train(1, [*job, *lora], tmp_path / "whole")
    train(1, [*job, *lora, "--train.steps", "4"], tmp_path)
    train(1, [*job, *lora, "--checkpoint.allow_change", "train.steps"], tmp_path)
    (whole, whole_report), (metrics, report) = read(tmp_path / "whole" / "run"), read(tmp_path / "run")
    for figure in ("loss", "grad_norm", "units"):
        assert [line[figure] for line in metrics] == [line[figure] for line in whole]
    assert report["texts"] == whole_report["texts"]
    assert report["test"] == whole_report["test"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.name", "BASE"], "the tokenizer has no chat template"),
        (["--model.name", "BASE", "--data.template", "none.jinja"], "--data.template none.jinja cannot be read"),
        (["--model.name", "sample:minilm"], "the tokenizer has no chat template"),
        (["--data.layout", "alpaca"], "are no conversations to learn from"),
        (["--data.max_length", "8"], "no conversations left to learn from"),
        (["--data.weights", "1"], "--data.weights has no effect on one source"),
        (["--adapter.targets", "nowhere"], "nowhere"),
        (["--quantization", "nf4", "--adapter.name", "none"], "there would be nothing to train"),
    ],
)
def test_what_is_refused(options: list[str], said: str, job: list[str], there: Path, tmp_path: Path) -> None:
    options = [str(there / "base") if option == "BASE" else option for option in options]
    text = learn("sft", 1, [*job, *options], tmp_path, 2)
    assert said in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()
