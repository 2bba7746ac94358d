"""Tags of words: a label on the first of a word's sub-words, names counted as seqeval counts them."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from seqeval.metrics import f1_score, precision_score, recall_score
from transformers import AutoTokenizer, BertForQuestionAnswering, BertForTokenClassification

from tests.parity.job import tiny_bert, tiny_tokenizer
from toolkit.compute import remove_padding
from toolkit.compute.padding_free import short_texts
from toolkit.data.entities import labels_of
from toolkit.data.token_tags import IGNORED, _encode, frame, pieces, sub_words
from toolkit.samples import fetch
from toolkit.tasks import TokenClassification

LABELS = labels_of(["LOC", "ORG", "PER"])


@pytest.fixture
def task() -> TokenClassification:
    return TokenClassification(LABELS, tiny_tokenizer(), vocabulary=100)


def rows(sizes: list[int], draw: random.Random) -> dict[str, Any]:
    """Sentences of so many tokens, of which two thirds have a label."""
    labels = [[draw.choice([IGNORED, draw.randrange(7), draw.randrange(7)]) for _ in range(size)] for size in sizes]
    for row in labels:
        row[0] = 0
    return {"input_ids": [[5] * size for size in sizes], "labels": labels, "id": list(range(len(sizes)))}


def test_names_are_counted_as_by_seqeval(task: TokenClassification) -> None:
    draw = random.Random(0)
    torch.manual_seed(0)
    said: list[list[str]] = []
    there: list[list[str]] = []
    total: dict[str, torch.Tensor] = {}
    for sizes in ([3, 9, 14], [1, 20], [7]):
        batch = task.collate(rows(sizes, draw), empty=False)
        truth = torch.nn.functional.one_hot(batch.labels.clamp(0), 7).float()
        logits = truth + torch.randn(truth.shape)  # right more often than not
        for labels, row in zip(batch.labels.tolist(), logits.argmax(-1).tolist(), strict=True):
            words = [at for at, label in enumerate(labels) if label != IGNORED]
            there.append([LABELS[labels[at]] for at in words])
            said.append([LABELS[row[at]] for at in words])
        for name, count in task.measure(SimpleNamespace(logits=logits), batch).items():
            total[name] = total.get(name, 0) + count
    found = task.metrics(total)
    assert found["entity_f1"] == pytest.approx(f1_score(there, said))
    assert found["entity_precision"] == pytest.approx(precision_score(there, said))
    assert found["entity_recall"] == pytest.approx(recall_score(there, said))
    assert found["units"] == sum(map(len, there))
    assert 0.1 < found["entity_f1"] < 0.9
    per_kind = [row["f1"] for row in found["per_class"]]
    assert per_kind == pytest.approx(list(f1_score(there, said, average=None)))


def test_the_loss_is_a_sum_over_words_and_filler_counts_for_nothing(task: TokenClassification) -> None:
    columns = rows([4, 9], random.Random(1))
    batch = task.collate(columns, empty=False)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [4, 9]
    assert batch.labels[0, 4:].tolist() == [IGNORED] * 5
    logits = torch.randn(2, 9, 7, requires_grad=True)
    words = batch.labels != IGNORED
    expected = -logits.log_softmax(-1)[words].gather(1, batch.labels[words][:, None]).sum()
    assert task.loss(SimpleNamespace(logits=logits), batch).item() == pytest.approx(expected.item(), rel=1e-6)
    assert task.units(batch) == int(words.sum())
    filler = task.collate(columns, empty=True)
    assert task.units(filler) == 0
    assert filler.ids == []
    assert task.loss(SimpleNamespace(logits=logits), filler).item() == 0
    assert task.measure(SimpleNamespace(logits=logits), filler)["names"].sum() == 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"input_ids": [5, 100]}, "token id 100"),
        ({"labels": [0, 7]}, "label 7 is not among the 7 tags"),
        ({"labels": [0]}, "not as many whole numbers"),
        ({"labels": None}, "not as many whole numbers"),
    ],
)
def test_samples_that_cannot_be_used(task: TokenClassification, fault: dict[str, Any], reason: str) -> None:
    fit = {"input_ids": [5, 6], "labels": [0, IGNORED], "id": 1}
    assert task.problem(fit) == ""
    assert reason in task.problem(fit | fault)


def test_labels_stand_on_the_first_sub_words() -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetch("minilm"))
    row = {"tokens": ["Leicestershire", "beat", "Somerset", "."], "tags": ["B-ORG", "O", "B-ORG", "O"]}
    (found,) = _encode(row, labels=LABELS, tokenizer=tokenizer, room=40)
    words = tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert (words[0], words[-1], found["length"]) == ("[CLS]", "[SEP]", len(words))
    marked = {words[at]: LABELS[label] for at, label in enumerate(found["labels"]) if label != IGNORED}
    assert marked == {"leicestershire": "B-ORG", "beat": "O", "somerset": "B-ORG", ".": "O"}
    (rare,) = _encode({"tokens": ["Xylokastrovian"], "tags": ["B-LOC"]}, labels=LABELS, tokenizer=tokenizer, room=40)
    assert len(rare["input_ids"]) > 4
    assert rare["labels"] == [IGNORED, 1, *[IGNORED] * (len(rare["labels"]) - 2)]


def test_chinese_characters_have_a_token_each_and_none_for_blanks_that_are_not_there() -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetch("e5-multilingual"))
    assert frame(tokenizer) == ([0], [2])
    ids = sub_words([*"江泽民", "Berlin", "民", "\u200b"], [False, False, False, True, True, False], tokenizer)
    words = [tokenizer.convert_ids_to_tokens(word) for word in ids]
    assert words[:5] == [["江"], ["泽"], ["民"], ["▁Berlin"], ["▁", "民"]]
    assert ids[5], "each word has a token for its label"


def test_long_sentences_go_on_but_not_within_a_name() -> None:
    stops = [True, True, False, False, True, True]
    assert list(pieces([1, 1, 1, 1, 1, 1], 3, stops)) == [(0, 1), (1, 4), (4, 6)]
    assert list(pieces([1] * 5, 2, [True] + [False] * 4)) == [(0, 2), (2, 4), (4, 5)]  # a name that is too long
    assert list(pieces([1, 9, 1], 4, [True] * 3)) == [(0, 1), (1, 2), (2, 3)]
    row = {"tokens": ["w5"] * 7, "tags": ["O", "B-PER", "I-PER", "O", "O", "B-LOC", "I-LOC"]}
    found = _encode(row, labels=LABELS, tokenizer=tiny_tokenizer(), room=3)
    assert [part["labels"] for part in found] == [[0, 5, 6], [0, 0], [1, 2]]


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForQuestionAnswering])
def test_both_heads_compute_without_padding(kind: Any) -> None:
    config = tiny_bert().config
    config._attn_implementation, config.num_labels = "sdpa", 2
    torch.manual_seed(0)
    model = kind(config).eval()
    inputs = short_texts(config)
    there = inputs["attention_mask"].bool()
    with torch.no_grad():
        padded = model(**inputs)[0][there]
        assert remove_padding(model) == ""
        assert torch.allclose(model(**inputs)[0][there], padded, atol=1e-5)
