"""Near-duplicates: which texts are alike in English and in Chinese, which of them stays, and that none leaks."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.edited import all_texts, cleaned, likeness, similarity, text, write
from toolkit.config import ChatConfig, CorpusConfig
from toolkit.data import text_corpus
from toolkit.data.chat import conversations
from toolkit.data.near import rows_of_a_band
from toolkit.errors import ConfigError, DataError

SCRIPTS = ("english", "chinese")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))


# What is alike


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.94])
def test_copies_above_the_threshold_are_dropped_and_those_below_stay(
    script: str, threshold: float, tmp_path: Path
) -> None:
    edits = range(1, 15)
    copies = {number: (text(script, number), text(script, number, number)) for number in edits}
    alike = {number for number, pair in copies.items() if similarity(*pair, script) >= threshold}
    for number, pair in copies.items():
        assert similarity(*pair, script) == pytest.approx(likeness(script, number))
    assert 0 < len(alike) < len(copies)
    others = [text(script, number) for number in range(20, 40)]
    path = write(tmp_path / "texts.jsonl", [*itertools.chain(*copies.values()), *others])
    corpus = cleaned(path, near_duplicates=threshold)
    left = set(all_texts(corpus))
    assert {number for number, pair in copies.items() if not left.issuperset(pair)} == alike
    assert left >= set(others)
    assert corpus.facts["dropped"]["nearly repeated"] == len(alike)
    assert len(left) == 2 * len(copies) + len(others) - len(alike)


@pytest.mark.parametrize("script", SCRIPTS)
def test_hardly_a_pair_at_the_threshold_is_missed_and_none_below_is_dropped(script: str, tmp_path: Path) -> None:
    edits = max(edits for edits in range(20) if likeness(script, edits) >= 0.8)
    path = write(
        tmp_path / "texts.jsonl",
        [text(script, number, copy) for number in range(150) for copy in (0, edits if number < 100 else edits + 1)],
    )
    dropped = cleaned(path, near_duplicates=0.8).facts["dropped"]["nearly repeated"]
    assert 97 <= dropped <= 100


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_the_bands_find_a_pair_at_the_threshold(threshold: float) -> None:
    rows = rows_of_a_band(threshold)
    draws = np.random.default_rng(0).random((20_000, 128 // rows, rows)) < threshold
    assert draws.all(axis=2).any(axis=1).mean() >= 0.985


def test_case_punctuation_and_blanks_make_no_other_text(tmp_path: Path) -> None:
    one, chinese = text("english", 1), text("chinese", 1)
    other = ", ".join(one.upper().split()) + "!"
    full_width = "，".join([chinese[:100], chinese[100:]]) + "。"
    texts = [one, other, chinese, full_width, "Yes, sir.", "yes sir", "🦜🦜", "🦜", "…", *map(str, range(10))]
    corpus = cleaned(write(tmp_path / "texts.jsonl", texts), near_duplicates=1.0)
    assert corpus.facts["dropped"]["nearly repeated"] == 3
    assert {"🦜🦜", "🦜", "…"} <= set(all_texts(corpus))  # without words there is nothing to compare


# Which stays


def clusters(script: str) -> list[str]:
    """Of each text some copies, one more edited than the other, so that neighbours are alike and the ends are not."""
    return [text(script, number, edits) for number in range(12) for edits in range(0, 12, 2)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_two_that_stay_are_alike_and_none_goes_without_one_like_it(script: str, tmp_path: Path) -> None:
    texts = clusters(script)
    left = all_texts(cleaned(write(tmp_path / "texts.jsonl", texts), near_duplicates=0.8))
    assert 12 < len(left) < len(texts)
    for one, other in itertools.combinations(left, 2):
        assert similarity(one, other, script) < 0.8
    for gone in set(texts) - set(left):
        assert max(similarity(gone, stays, script) for stays in left) >= 0.8


def test_what_stays_follows_from_the_texts_alone(tmp_path: Path) -> None:
    texts = [*clusters("english"), *clusters("chinese"), *(text("english", number) for number in range(50, 2100))]
    one = cleaned(write(tmp_path / "one.jsonl", texts), near_duplicates=0.8, tokenize_processes=1)
    random.Random(1).shuffle(texts)
    files = (write(tmp_path / "b.jsonl", texts[:900]), write(tmp_path / "a.jsonl", texts[900:]))
    two = cleaned(files, near_duplicates=0.8, tokenize_processes=2)
    for role in ("train", "validation", "test"):
        assert set(one.splits[role]["text"]) == set(two.splits[role]["text"])
    assert one.facts["dropped"]["nearly repeated"] == two.facts["dropped"]["nearly repeated"] > 30


def test_the_long_one_stays(tmp_path: Path) -> None:
    whole = text("english", 1)
    texts = [whole.rsplit(" ", 10)[0], whole, whole.rsplit(" ", 5)[0], *map(str, range(10))]
    corpus = cleaned(write(tmp_path / "texts.jsonl", texts), near_duplicates=0.8)
    assert [found for found in all_texts(corpus) if len(found) > 10] == [whole]


# Across the splits


def test_a_held_out_text_wins(tmp_path: Path) -> None:
    held = [text("english", number) for number in range(3)] + [text("chinese", 9), text("chinese", 9, 1)]
    test = write(tmp_path / "test.jsonl", held)
    validation = write(tmp_path / "validation.jsonl", [text("english", 0, 1), text("english", 10), text("english", 11)])
    near = [text("english", 0, 2), text("chinese", 9, 2), text("english", 10, 2)]
    other = [text("english", 2, 12), text("english", 30), text("english", 31), text("english", 31, 1)]
    # A long one of the training data is no reason to touch a split that is given.
    longer = text("english", 11) + " and some more"
    train = write(tmp_path / "train.jsonl", [*near, longer, *other])
    corpus = cleaned(train, near_duplicates=0.8, validation=validation, test=test)
    assert corpus.splits["test"]["text"] == held
    assert corpus.splits["validation"]["text"] == [text("english", 10), text("english", 11)]
    stays = set(corpus.splits["train"]["text"])
    assert stays >= {*other[:2]}
    assert len(stays & set(other[2:])) == 1
    assert len(stays) == 3
    dropped = corpus.facts["dropped"]
    assert dropped["nearly in a held-out split"] == len(near) + 1 + 1
    assert dropped["nearly repeated"] == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_taken_from_the_training_data_has_none_like_it_there(seed: int, tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", [*clusters("english"), *(text("english", i) for i in range(20, 40))])
    settings: dict[str, Any] = {"validation_share": 0.3, "test_share": 0.3, "split_seed": seed}

    def most_alike(**more: Any) -> float:
        splits = cleaned(path, **settings, **more).splits
        held = [*splits["validation"]["text"], *splits["test"]["text"]]
        return max(similarity(one, other, "english") for one in splits["train"]["text"] for other in held)

    assert most_alike() >= 0.8
    assert most_alike(near_duplicates=0.8) < 0.8


# Conversations


def conversation(question: str, answer: str, system: str | None = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


def test_conversations_are_compared_by_what_is_said(tmp_path: Path) -> None:
    rules = text("english", 99) + text("english", 98)
    rows = [conversation(f"What of {number}?", f"Nothing but {number} at all.", rules) for number in range(20)]
    rows += [conversation("Please go on.", text("chinese", 1), system) for system in (None, "Be short.", rules)]
    rows += [conversation("Please go on!", text("chinese", 1, 1), "Be kind.")]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    corpus = conversations(ChatConfig(name=(str(path),), near_duplicates=0.8, test_share=0.1, validation_share=0.1))
    assert corpus.facts["dropped"]["nearly repeated"] == 3
    assert sum(corpus.facts["texts"].values()) == 21


# Settings


def test_nothing_is_compared_unless_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", clusters("english"))
    plain, clean, strict = (cleaned(path, near_duplicates=value) for value in (None, 0.8, 0.9))
    assert not any("near" in reason for reason in plain.facts["dropped"])
    assert len(all_texts(plain)) > len(all_texts(strict)) > len(all_texts(clean))
    assert len({plain.fingerprint, clean.fingerprint, strict.fingerprint}) == 3


def test_what_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", [text("english", 1, edits) for edits in range(3)])
    with pytest.raises(ConfigError, match=r"--data.near_duplicates 0.8 contradicts --data.deduplicate False"):
        text_corpus(CorpusConfig(name=(str(path),), near_duplicates=0.8, deduplicate=False))
    with pytest.raises(DataError, match=r"1 training texts are left after cleaning \(dropped: 2 nearly repeated\)"):
        cleaned(path, near_duplicates=0.8)
    with pytest.raises(DataError, match=r"0 training texts are left .* \(dropped: 2 blank\)"):
        cleaned(write(tmp_path / "blank.jsonl", ["", " "]), near_duplicates=0.8)
