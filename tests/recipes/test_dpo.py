"""Preference tuning: the same numbers everywhere, what is preferred is learnt, and a run that goes on is the same."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.chats import save_chat_model
from tests.recipes.conftest import Learnt
from tests.recipes.launching import assert_same_curve, learn, read
from toolkit.checkpoint.account import account

STEPS = 6
ADAPTERS = {
    "whole": ("--adapter.name", "none", "--optim.lr", "1e-3"),
    "lora": ("--adapter.name", "lora", "--adapter.targets", "all-linear", "--adapter.rank", "4"),
    "nf4": ("--adapter.name", "lora", "--adapter.rank", "4", "--quantization", "nf4"),
}
QUICK = {("lora", "ddp"), ("whole", "fsdp"), ("whole", "zero3")}
CASES = [
    pytest.param(adapter, strategy, marks=() if (adapter, strategy) in QUICK else pytest.mark.slow)
    for adapter in ADAPTERS
    for strategy in ("ddp", "fsdp", "zero2", "zero3")
]
THINGS = ("the sky", "a bird", "my house", "the road", "天空", "市场")


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is preferred is thanks, and no complaint; in both languages, some behind a system's message."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(90):
        question = f"{number}: What of {THINGS[number % len(THINGS)]}?"
        system = [{"role": "system", "content": "Be brief."}] if number % 4 == 0 else []
        prompt: Any = [*system, {"role": "user", "content": question}] if number % 3 else question
        rows.append({"prompt": prompt, "chosen": "Thank you. 谢谢。", "rejected": f"No! {'No! ' * (number % 5)}"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    save_chat_model(folder / "model")
    return folder


@pytest.fixture
def job(there: Path) -> list[str]:
    return [
        *("--model.name", str(there / "model"), "--data.name", str(there / "pairs.jsonl")),
        *("--data.validation_share", "0.1", "--data.test_share", "0.1"),
        *("--train.global_batch", "8", "--train.steps", str(STEPS), "--train.micro_batch", "4"),
        *("--optim.lr", "1e-2", "--optim.schedule", "constant", "--precision", "fp32"),
        *("--generate.tokens", "8", "--generate.prompts", "What of the sky?"),
        *("--run.eval_every", "3", "--run.dir", "run"),
    ]


train = functools.partial(learn, "dpo")


@pytest.mark.parametrize(("adapter", "strategy"), CASES)
def test_the_same_numbers_everywhere(
    adapter: str,
    strategy: str,
    job: list[str],
    tmp_path: Path,
    alone: Callable[..., Learnt],
) -> None:
    expected, expected_report = alone("dpo", *job, *ADAPTERS[adapter])
    train(2, [*job, *ADAPTERS[adapter], "--train.micro_batch", "2", "--strategy.name", strategy], tmp_path)
    metrics, report = read(tmp_path / "run")
    assert_same_curve(metrics, expected)
    for when in ("before", "test"):
        for figure in ("loss", "reward_margin", "reward_accuracy", "likelier"):
            assert report[when][figure] == pytest.approx(expected_report[when][figure], rel=1e-5, abs=1e-6), figure
    assert account(tmp_path / "run").sound


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo"])
def test_what_is_preferred_is_learnt(loss: str, job: list[str], there: Path, tmp_path: Path) -> None:
    options = [*job, *ADAPTERS["lora"], "--preference.loss", loss, "--train.steps", "12", "--run.eval_every", "12"]
    shown = train(1, options, tmp_path)
    _, report = read(tmp_path / "run")
    before, after = report["before"], report["test"]
    if loss != "orpo":  # the model is its own reference at first
        assert before["reward_margin"] == pytest.approx(0, abs=1e-6)
        assert before["reward_accuracy"] == pytest.approx(0.5, abs=0.5)
    assert after["reward_margin"] > before["reward_margin"] + 0.01
    assert after["reward_accuracy"] == 1
    assert after["likelier"] >= before["likelier"]
    assert after["loss"] < before["loss"]
    assert (tmp_path / "run" / "reference").exists() == (loss != "orpo")
    for said in ("reward margin", "reward accuracy", "pairs", "never whole", "lora of rank 4", f"{loss}, beta 0.1"):
        assert said in shown
    read_me = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"| Reward accuracy | {before['reward_accuracy']:.4f} | 1.0000 |" in read_me
    assert str(there) not in read_me
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Preferred answer likelier" in page
    AutoModelForCausalLM.from_pretrained(there / "model").load_adapter(str(tmp_path / "run" / "model"))


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(job: list[str], tmp_path: Path) -> None:
    """It is held against what the model thought at first, on another number of ranks too, and not without that."""
    (tmp_path / "whole").mkdir()
    whole = ADAPTERS["whole"]
    train(1, [*job, *whole], tmp_path / "whole")
    train(1, [*job, *whole, "--train.steps", "3"], tmp_path)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.copytree(tmp_path / "run", tmp_path / "lost")
    (expected, expected_report), change = read(tmp_path / "whole" / "run"), ["--checkpoint.allow_change", "train.steps"]
    train(1, [*job, *whole, *change], tmp_path)
    metrics, report = read(tmp_path / "run")
    for figure in ("loss", "grad_norm", "units"):
        assert [line[figure] for line in metrics] == [line[figure] for line in expected]
    assert report["test"] == expected_report["test"]

    on_two = [*job, *whole, "--train.micro_batch", "2", "--strategy.name", "ddp", "--run.dir", "again"]
    changes = [*change, "train.micro_batch", "strategy.name"]
    train(2, [*on_two, *changes], tmp_path)
    metrics, _ = read(tmp_path / "again")
    assert [line["loss"] for line in metrics] == pytest.approx([line["loss"] for line in expected], rel=1e-5)

    shutil.rmtree(tmp_path / "lost" / "reference")
    said = train(1, [*job, *whole, *change, "--run.dir", "lost"], tmp_path, code=2)
    assert "what the model thought before training cannot be computed any more" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.max_length", "8"], "no conversations left to learn from"),
        (["--preference.loss", "ppo"], "preference.loss"),
        (["--preference.loss", "ipo", "--train.label_smoothing", "0.1"], "--train.label_smoothing has no effect"),
        (["--model.name", "sample:minilm"], "the tokenizer has no chat template"),
    ],
)
def test_what_is_refused(options: list[str], said: str, job: list[str], tmp_path: Path) -> None:
    shown = train(1, [*job, *options], tmp_path, code=2)
    assert said in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()
