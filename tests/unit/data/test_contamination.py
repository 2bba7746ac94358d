"""Passages of held-out texts are found in training texts, in scripts with and without blanks, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.edited import cleaned, text, write
from toolkit.config import ChatConfig
from toolkit.data.chat import conversations
from toolkit.data.contents import grams

ENGLISH = "The committee said on Monday that it would publish its full report before the end of the year."
CHINESE = "委员会星期一表示将在今年年底之前公布完整的调查报告并接受各界的监督和批评"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLKIT_CACHE", str(tmp_path / "cache"))


def quoting(passage: str, number: int) -> str:
    """A training text with the passage in its midst."""
    return f"{text('english', number)} 说 {passage} 了 {text('chinese', number)}"


@pytest.mark.parametrize(
    ("held_out", "long_enough", "too_short"),
    [
        (ENGLISH, " ".join(ENGLISH.split()[3:16]), " ".join(ENGLISH.split()[3:15])),
        (ENGLISH, "COMMITTEE SAID — on monday,\nthat it would 'publish' its full report before the", "committee said"),
        (CHINESE, CHINESE[5:27], CHINESE[5:26]),
        (CHINESE, "，".join([CHINESE[5:15], CHINESE[15:27]]), "，".join([CHINESE[5:15], CHINESE[15:26]])),
        # Ten words weigh 50 and five characters 15: together the 65 of thirteen words.
        (f"{ENGLISH} {CHINESE}", " ".join(ENGLISH.split()[-10:]) + CHINESE[:5], "end of the year" + CHINESE[:5]),
        (
            "日本語の文章では、漢字と仮名が続けて書かれます。本当に。",
            "漢字と仮名が続けて書かれます本当に",
            "漢字と仮名が続けて書かれます",
        ),
    ],
    ids=["english", "case and punctuation", "chinese", "chinese punctuation", "both", "japanese"],
)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_thirteen_words_or_as_much_in_characters(
    split: str, held_out: str, long_enough: str, too_short: str, tmp_path: Path
) -> None:
    length = 9 if "仮名" in held_out else 13
    other = "test" if split == "validation" else "validation"
    held = {
        split: write(tmp_path / "held.jsonl", [held_out]),
        other: write(tmp_path / "o.jsonl", [text("english", 90)]),
    }
    clean = [quoting(too_short, 1), *(text("chinese", number) for number in range(10, 20))]
    train = write(tmp_path / "train.jsonl", [*clean, quoting(long_enough, 2), quoting(long_enough, 3)])
    plain, corpus = (cleaned(train, decontaminate=value, **held) for value in (None, length))
    assert corpus.splits[split]["text"] == [held_out]
    assert corpus.splits["train"]["text"] == clean
    assert len(plain.splits["train"]) == len(clean) + 2
    assert corpus.facts["dropped"][f"sharing {length} words with a held-out split"] == 2
    assert not any("sharing" in reason for reason in plain.facts["dropped"])
    assert plain.fingerprint != corpus.fingerprint


def test_what_is_left_shares_nothing_with_what_is_held_out(tmp_path: Path) -> None:
    passages = [f"{ENGLISH} And so {word} it was in all of these years." for word in "abcdefgh"]
    texts = [quoting(passages[number % 8], number) for number in range(40)]
    texts += [text("chinese", number) for number in range(60)]
    path = write(tmp_path / "texts.jsonl", texts)
    corpus = cleaned(path, decontaminate=13, validation_share=0.05, test_share=0.05, train_texts=50)
    held = np.concatenate(
        [grams(found, 13) for name in ("validation", "test") for found in corpus.splits[name]["text"]]
    )
    assert any("committee" in found for name in ("validation", "test") for found in corpus.splits[name]["text"])
    left = corpus.splits["train"]["text"]
    assert not any(np.isin(grams(found, 13), held).any() for found in left)
    assert len(left) == 50  # the limit counts what is left
    assert corpus.facts["dropped"]["sharing 13 words with a held-out split"] > 25


def test_a_held_out_text_shorter_than_that_drops_nothing(tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", ["Yes, of course.", "好的", "🦜"])
    train = write(tmp_path / "train.jsonl", [quoting("Yes, of course. 好的", number) for number in range(10)])
    corpus = cleaned(train, decontaminate=13, test=held)
    assert corpus.facts["dropped"]["sharing 13 words with a held-out split"] == 0


def test_conversations_share_what_is_said_and_not_their_rules(tmp_path: Path) -> None:
    def row(said: str, number: int) -> dict[str, Any]:
        roles = ("system", "user", "assistant")
        contents = (ENGLISH * 2, f"Number {number}?", said)
        return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]}

    held, train = tmp_path / "held.jsonl", tmp_path / "train.jsonl"
    held.write_text(json.dumps(row(CHINESE, 0)) + "\n", encoding="utf-8")
    rows = [row(text("chinese", number), number) for number in range(10)] + [row(f"他说：“{CHINESE}”", 11)]
    train.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    corpus = conversations(ChatConfig(name=(str(train),), test=(str(held),), decontaminate=13, validation_share=0.2))
    assert corpus.facts["dropped"]["sharing 13 words with a held-out split"] == 1
    assert sum(corpus.facts["texts"].values()) == 11


# Runs of words


def test_runs_are_found_again_wherever_they_stand() -> None:
    for passage, length in ((ENGLISH, 5), (CHINESE, 5), (f"{ENGLISH}{CHINESE}", 13)):
        alone, within = grams(passage, length), grams(quoting(passage, 5), length)
        assert len(np.unique(alone)) == len(alone) > 0
        at = int(np.flatnonzero(within == alone[0])[0])
        assert (within[at : at + len(alone)] == alone).all()


@pytest.mark.parametrize(
    ("passage", "length", "runs"),
    [
        ("one two three four five", 5, 1),
        ("one two three four", 5, 0),
        ("一二三四五六七八九", 5, 1),
        ("一二三四五六七八", 5, 0),
        ("naïve café ÉCOLE straße don't", 5, 2),  # an apostrophe parts a word
        ("안녕하세요 여러분 반갑습니다", 3, 1),
        ("…", 5, 0),
        ("", 5, 0),
    ],
)
def test_how_many_runs_a_text_has(passage: str, length: int, runs: int) -> None:
    found = grams(passage, length)
    assert (len(found), found.dtype) == (runs, np.uint64)
    assert len(grams(passage, length, whole=True)) == (max(runs, 1) if passage.strip("…") else 0)


def test_full_width_and_case_are_the_same_words() -> None:
    assert (grams("ＦＵＬＬ width １２３ 市场", 3) == grams("full WIDTH 123市场", 3)).all()
