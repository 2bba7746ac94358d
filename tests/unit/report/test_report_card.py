"""The README of a saved model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from toolkit.report import model_card

REPORT: dict[str, Any] = {
    "before": {"loss": 2.0, "perplexity": 7.389, "units": 1200},
    "test": {"loss": 1.0, "perplexity": 2.718, "units": 1200},
    "steps": 1400,
    "plan": {
        "model": {"name": "owner/net", "adapter": "lora of rank 16"},
        "data": {"sources": "/home/someone/private/chats.jsonl, sample:instructions", "tokens": "9 train | 1 test"},
        "strategy": {"name": "fsdp"},
        "run": {"folder": "/scratch/runs/1"},
    },
}
MANIFEST: dict[str, Any] = {
    "command": "recipes/sft.py --model.name owner/net",
    "seed": 3,
    "data_fingerprint": "abc",
    "versions": {"torch": "2.13.0", "numpy": "2"},
    "git": {"commit": "0123456789abcdef", "dirty": True},
}


def card(name: str | None = "owner/net", adapter: str = "lora") -> tuple[dict[str, Any], str]:
    manifest = copy.deepcopy(MANIFEST)
    manifest["requested"] = {"model": {"name": name}, "adapter": {"name": adapter}}
    _, front, text = model_card(REPORT, manifest).split("---\n", 2)
    return yaml.safe_load(front), text


def test_what_a_reader_asks_for() -> None:
    front, text = card()
    assert front == {"library_name": "peft", "base_model": "owner/net", "tags": ["sft", "lora"]}
    for line in (
        "# owner/net, by sft",
        "| Perplexity | 7.3890 | 2.7180 |",
        "| Samples or tokens | 1,200 | 1,200 |",
        "| model | name | owner/net |",
        "|  | adapter | lora of rank 16 |",
        "| data | sources | chats.jsonl, sample:instructions |",
        r"|  | tokens | 9 train \| 1 test |",
        "Seed 3; data abc; commit 0123456789ab with changes; 1,400 steps.",
        "| torch | 2.13.0 |",
    ):
        assert line in text.splitlines()
    assert "numpy" not in text


def test_folders_of_the_machine_stay_there() -> None:
    _, text = card("/home/someone/net")
    assert "someone" not in text
    assert "scratch" not in text
    assert "# net, by sft" in text


@pytest.mark.parametrize("name", [None, "sample:smollm2", "/home/someone/net", "here/net"])
def test_a_base_that_no_hub_has_is_not_named_as_one(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "net").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    front, text = card(name, "none")
    assert front == {"library_name": "transformers", "tags": ["sft"]}
    assert ("# A new model, by sft" in text) == (name is None)
