"""Activation checkpointing under every strategy: the numbers of a run without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chats import save_chat_model, write_chats
from tests.ranks import on_ranks
from tests.recipes.launching import recipe

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


@pytest.fixture(scope="module")
def alone() -> dict[str, list[dict[str, Any]]]:
    """The steps of a run of one process without it, by adapter."""
    return {}


def train(ranks: int, there: Path, options: list[str], cwd: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    job = [
        *("--model.name", str(there / "model"), "--data.name", str(there / "chats.jsonl")),
        *("--data.validation_share", "0.1", "--data.test_share", "0.1", "--generate.tokens", "4"),
        *("--train.global_batch", "8", "--train.steps", "4", "--train.micro_batch", "2", "--run.dir", "run"),
        *("--optim.lr", "1e-2", "--optim.schedule", "constant", "--precision", "fp32"),
    ]
    code, text = on_ranks(recipe, ranks, [*job, *options], str(cwd), None, "sft")[0]
    assert code == 0, text
    lines = (cwd / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((cwd / "run" / "report.json").read_text())


@pytest.mark.parametrize(("kind", "adapter", "strategy"), CASES)
def test_the_same_numbers(
    kind: str,
    adapter: str,
    strategy: str,
    there: Path,
    tmp_path: Path,
    alone: dict[str, list[dict[str, Any]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if adapter not in alone:
        alone[adapter] = train(1, there, list(ADAPTERS[adapter]), tmp_path_factory.mktemp(adapter))[0]
    options = [*ADAPTERS[adapter], "--strategy.name", strategy, "--train.activation_checkpointing", kind]
    metrics, report = train(2, there, options, tmp_path)
    for figure in ("loss", "grad_norm"):
        assert [m[figure] for m in metrics] == pytest.approx([m[figure] for m in alone[adapter]], rel=1e-5)
    assert report["plan"]["training"]["activations"] == f"computed again in backward, in 2 blocks ({kind})"


@pytest.mark.parametrize(
    ("ranks", "more", "said"),
    [
        (1, ["--train.compile", "True"], "selective does not see into what --train.compile compiles"),
        (2, ["--strategy.name", "zero3"], "the operators with which ZeRO-3 gathers weights"),
    ],
)
def test_what_is_refused(ranks: int, more: list[str], said: str, there: Path, tmp_path: Path) -> None:
    options = ["--model.name", str(there / "model"), "--data.name", str(there / "chats.jsonl"), "--run.dir", "run"]
    options += ["--train.activation_checkpointing", "selective", *more]
    code, text = on_ranks(recipe, ranks, options, str(tmp_path), None, "sft")[0]
    assert code == 2
    assert said in " ".join(text.replace("│", " ").split())
    assert not (tmp_path / "run").exists()
