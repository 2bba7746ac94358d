"""Pairs of answers: how rows are read, what is refused, what of each is learnt, and what becomes of long ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chats import chat_tokenizer
from toolkit.config import PairsConfig
from toolkit.data import LanguageData, answer_pairs, preferences
from toolkit.data.files import ROLES
from toolkit.errors import DataError

ASKED = {"role": "user", "content": "Who sings?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("A bird sings.", "天空是蓝色的。"))
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}?", "chosen": f"{i}!", "rejected": "What?"} for i in range(count)]


def read(path: Path, **settings: Any) -> list[dict[str, Any]]:
    corpus = answer_pairs(PairsConfig(name=(str(path),), **settings))
    return [json.loads(text) for role in ROLES for text in corpus.splits[role]["text"]]


def prepared(path: Path, **settings: Any) -> LanguageData:
    config = PairsConfig(name=(str(path),), **settings)
    return preferences(config, answer_pairs(config), chat_tokenizer())


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"prompt": "Who sings?", "chosen": "A bird sings.", "rejected": "天空是蓝色的。"}, [ASKED]),
        ({"prompt": [SYSTEM, ASKED], "chosen": [GOOD], "rejected": [BAD]}, [SYSTEM, ASKED]),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, [ASKED]),
        ({"prompt": "Who sings?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "score": 3}, [ASKED]),
    ],
    ids=["texts", "messages", "conversations", "conversations and the question"],
)
def test_layouts(row: dict[str, Any], question: Any, tmp_path: Path) -> None:
    found = read(write(tmp_path / "pairs.jsonl", [*pairs(40), row]))
    assert {"question": question, "chosen": GOOD, "rejected": BAD} in found
    assert len(found) == 41


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "A?", "chosen": "B"}, "their column 'rejected' is missing or empty"),
        ({"prompt": "A?", "chosen": " ", "rejected": "C"}, "their column 'chosen' is missing or empty"),
        ({"chosen": "B", "rejected": "C"}, "a message of the assistant comes first"),
        ({"prompt": "A?", "chosen": "B", "rejected": "B"}, "both answers are the same"),
        (
            {"chosen": [{"role": "user", "content": "?"}, GOOD], "rejected": [ASKED, BAD]},
            "their two conversations differ before the last answer",
        ),
        ({"prompt": "A?", "chosen": [ASKED], "rejected": "C"}, "they do not end with an answer of the assistant"),
        ({"prompt": "A?", "completion": "B", "label": True}, "their column 'chosen' is missing or empty"),
    ],
)
def test_what_is_no_pair(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [*pairs(40), row])
    corpus = answer_pairs(PairsConfig(name=(str(path),)))
    assert said in corpus.facts["warnings"][0]
    assert "row 41" in corpus.facts["warnings"][0]
    assert corpus.facts["dropped"]["malformed"] == 1
    with pytest.raises(DataError, match="are no pairs of answers to learn from") as caught:
        read(path, max_bad_rows=0)
    assert said in str(caught.value)


def test_only_the_last_answers_count(tmp_path: Path) -> None:
    earlier = [ASKED, GOOD, {"role": "user", "content": "And what colour has the sky?"}]
    row = {"prompt": earlier, "chosen": [BAD], "rejected": [{"role": "assistant", "content": "None."}]}
    data = prepared(write(tmp_path / "pairs.jsonl", [row, *pairs(60)]), train_texts=None)
    tokenizer = chat_tokenizer()
    everything = [row for split in (data.train, data.validation, data.test) for row in split]
    found = next(row for row in everything if "sky" in tokenizer.decode(row["input_ids"]))
    first = found["pieces"][0]
    halves = [(found["input_ids"][part], found["trained"][part]) for part in (slice(first), slice(first, None))]
    learnt = [tokenizer.decode([t for t, mark in zip(*half, strict=True) if mark]) for half in halves]
    assert learnt == ["天空是蓝色的。<|im_end|>", "None.<|im_end|>"]
    assert all("A bird sings." in tokenizer.decode(ids) for ids, _ in halves)
    assert found["length"] == len(found["input_ids"]) == sum(found["pieces"])


def test_numbers_run_through_all_splits(tmp_path: Path) -> None:
    data = prepared(write(tmp_path / "pairs.jsonl", pairs(60)), validation_share=0.1, test_share=0.1)
    numbers = np.concatenate([split["number"] for split in (data.train, data.validation, data.test)])
    assert numbers.tolist() == list(range(60))
    assert sum(data.facts["sequences"].values()) == 60


def test_what_is_too_long(tmp_path: Path) -> None:
    long = {"prompt": "Who sings?", "chosen": "A bird sings. " * 30, "rejected": "No one."}
    path = write(tmp_path / "pairs.jsonl", [*pairs(60), long])
    room = 64
    cut = prepared(path, max_length=room)
    assert sum(cut.facts["sequences"].values()) == 61
    assert max(max(row) for split in (cut.train, cut.validation, cut.test) for row in split["pieces"]) == room
    assert sum(cut.facts["endless"].values()) == 1
    dropped = prepared(path, max_length=room, too_long="drop")
    assert sum(dropped.facts["sequences"].values()) == 60
    assert dropped.facts["dropped"]["too long"] == 1
    with pytest.raises(DataError, match="no conversations left to learn from"):
        prepared(path, max_length=8)
