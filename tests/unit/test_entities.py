"""Names in sequences of tokens: every scheme of tags is read as seqeval reads it, and written as BIO."""

from __future__ import annotations

import random

import pytest
from seqeval.metrics.sequence_labeling import get_entities

from toolkit.data.entities import bio, blanks_before, entities, is_tag, labels_of, tokens_in

PLACES = {"BIO": "BI", "IOB1": "BI", "BIOES": "BIES"}


@pytest.mark.parametrize("scheme", PLACES)
def test_any_tags_are_read_as_seqeval_reads_them(scheme: str) -> None:
    """Whether they keep to the rules of their scheme or not, as those of a model need not."""
    draw, found = random.Random(0), 0
    for _ in range(2000):
        tags = [draw.choice(["O", *(f"{p}-{k}" for p in PLACES[scheme] for k in ("PER", "LOC"))]) for _ in range(8)]
        own = [(kind, begin, end - 1) for begin, end, kind in entities(tags)]
        assert own == get_entities(tags), tags
        found += len(own)
    assert found > 2000


@pytest.mark.parametrize(
    "tags",
    [
        "B-PER I-PER B-PER O B-LOC I-LOC",  # BIO
        "I-PER I-PER B-PER O I-LOC I-LOC",  # IOB1
        "B-PER E-PER S-PER O B-LOC E-LOC",  # BIOES
        "B-PER L-PER U-PER O B-LOC L-LOC",  # BILOU
    ],
)
def test_schemes_say_the_same(tags: str) -> None:
    found = entities(tags.split())
    assert found == [(0, 2, "PER"), (2, 3, "PER"), (4, 6, "LOC")]
    assert " ".join(bio(found, 6)) == "B-PER I-PER B-PER O B-LOC I-LOC"


def test_what_is_a_tag() -> None:
    assert all(map(is_tag, ["O", "B-PER", "I-geo-political", "S-人名"]))
    assert not any(map(is_tag, ["", "NN", "B", "B-", "X-PER", "o", "B-a b"]))
    assert labels_of(["LOC", "PER"]) == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def test_tokens_of_a_running_text() -> None:
    text = "Angela Merkel's 1996-08-22 visit，江泽民在U.S. 说。"
    found = [text[begin:end] for begin, end in tokens_in(text)]
    assert found == ["Angela", "Merkel", "'", "s", "1996-08-22", "visit", "，", *"江泽民在", "U.S", ".", *"说。"]
    assert tokens_in(" \n") == []


def test_blanks_stand_between_words_but_not_between_characters() -> None:
    assert blanks_before(["EU", "rejects", "江", "泽", "U.S", "."]) == [False, True, False, False, False, True]
