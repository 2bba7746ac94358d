"""Activation checkpointing under every strategy: the numbers of a run without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chats import save_chat_model, write_chats
from tests.recipes.conftest import Learnt
from tests.recipes.launching import assert_same_curve, learn, read

LORA = ("--adapter.name", "lora", "--adapter.targets", "all-linear", "--adapter.rank", "4")
ADAPTERS = {"whole": ("--adapter.name", "none"), "lora": LORA, "nf4": (*LORA, "--quantization", "nf4")}
QUICK = {("selective", "whole", "fsdp"), ("full", "whole", "zero3"), ("full", "lora", "ddp"), ("full", "nf4", "fsdp")}
CASES = [
    pytest.param(kind, adapter, strategy, marks=() if (kind, adapter, strategy) in QUICK else pytest.mark.slow)
    for kind in ("selective", "full")
    for adapter, strategies in {
        "whole": ("ddp", "fsdp", "zero2", "zero3"),
        "lora": ("ddp", "fsdp", "zero3"),
        "nf4": ("fsdp",),
    }.items()
    for strategy in strategies
    if (kind, strategy) != ("selective", "zero3")  # refused
]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder / "chats.jsonl")
    save_chat_model(folder / "model")
    return folder


@pytest.fixture
def job(there: Path) -> list[str]:
    return [
        *("--model.name", str(there / "model"), "--data.name", str(there / "chats.jsonl")),
        *("--data.validation_share", "0.1", "--data.test_share", "0.1", "--generate.tokens", "4"),
        *("--train.global_batch", "8", "--train.steps", "4", "--train.micro_batch", "2", "--run.dir", "run"),
        *("--optim.lr", "1e-2", "--optim.schedule", "constant", "--precision", "fp32"),
    ]


@pytest.mark.parametrize(("kind", "adapter", "strategy"), CASES)
def test_the_same_numbers(
    kind: str,
    adapter: str,
    strategy: str,
    job: list[str],
    tmp_path: Path,
    alone: Callable[..., Learnt],
) -> None:
    expected, _ = alone("sft", *job, *ADAPTERS[adapter])
    options = [*ADAPTERS[adapter], "--strategy.name", strategy, "--train.activation_checkpointing", kind]
    learn("sft", 2, [*job, *options], tmp_path)
    metrics, report = read(tmp_path / "run")
    assert_same_curve(metrics, expected)
    assert report["plan"]["training"]["activations"] == f"computed again in backward, in 2 blocks ({kind})"


@pytest.mark.parametrize(
    ("ranks", "more", "said"),
    [
        (1, ["--train.compile", "True"], "selective does not see into what --train.compile compiles"),
        (2, ["--strategy.name", "zero3"], "the operators with which ZeRO-3 gathers weights"),
    ],
)
def test_what_is_refused(ranks: int, more: list[str], said: str, job: list[str], tmp_path: Path) -> None:
    options = [*job, "--train.activation_checkpointing", "selective", *more]
    assert said in learn("sft", ranks, options, tmp_path, code=2)
    assert not (tmp_path / "run").exists()
