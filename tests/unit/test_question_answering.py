"""Answers that stand in a passage: where they are in windows of tokens, which is given, and how it is compared."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from toolkit.data.answer_spans import _canonical, _encode, windows
from toolkit.data.rows import Unfit
from toolkit.samples import fetch
from toolkit.tasks import QuestionAnswering
from toolkit.tasks.question_answering import best_spans, exact_match, token_f1

BEGINNING = " ".join(f"word{number}" for number in range(60))
PASSAGE = f"{BEGINNING}, where Mark and Nora were arrested by the F.C.C. at noon."


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(fetch("minilm"))


def row(question: str, answer: str) -> dict[str, Any]:
    return {"question": question, "passage": PASSAGE, "answers": [[PASSAGE.index(answer), answer]]}


def rows(tokenizer: Any) -> dict[str, list[Any]]:
    asked = [("Who was arrested?", "Mark and Nora"), ("By whom?", "F.C.C."), ("What came first?", "word0")]
    found = [_encode(row(*one), tokenizer=tokenizer, length=64, stride=8)[0] for one in asked]
    return {key: [one[key] for one in found] for key in found[0]} | {"id": [7, 8, 9]}


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("The Mark, and Nora.", "mark and nora", 1, 1),
        ("Mark", "Mark and Nora", 0, 0.5),
        ("a cat and a cat", "the cat", 0, 0.5),  # 1 of 3 words, and 1 of 1
        ("dogs", "cats", 0, 0),
        ("U.S.", "US", 1, 1),  # as SQuAD's script: punctuation goes, and nothing comes in its place
        ("the", "", 1, 1),
        ("北京大学", "北京", 0, 2 / 3),  # 2 of 4 characters, and 2 of 2
        ("“北京大学”。", "北京大学", 1, 1),
        ("２０ 年", "20年", 1, 1),
    ],
)
def test_answers_are_compared_as_text(said: str, right: str, exact: float, f1: float) -> None:
    assert exact_match(said, right) == exact
    assert token_f1(said, right) == token_f1(right, said) == pytest.approx(f1)


def test_windows_cover_the_passage_and_know_the_answer(tokenizer: Any) -> None:
    found = windows("Who was arrested?", PASSAGE, tokenizer, length=64, stride=8)
    assert len(found) > 2
    assert all(len(window.input_ids) <= 64 for window in found)
    covered = {at for window in found for b, e in zip(window.begins, window.ends, strict=True) for at in range(b, e)}
    assert covered >= {at for at, character in enumerate(PASSAGE) if not character.isspace()}
    ends = [max(window.ends) for window in found]
    assert ends == sorted(ends)
    begin = PASSAGE.index("Mark and Nora")
    places = [window.find(begin, begin + 13) for window in found]
    assert places[0] == (0, 0)
    window, (first, last) = found[-1], places[-1]
    assert PASSAGE[window.begins[first] : window.ends[last]] == "Mark and Nora"
    assert tokenizer.decode(window.input_ids[first : last + 1]) == "mark and nora"
    with pytest.raises(Unfit, match="their question has"):
        windows("who " * 40, PASSAGE, tokenizer, length=64, stride=8)


def test_the_best_stretch_is_found_as_by_trying_all() -> None:
    torch.manual_seed(0)
    start, end, allowed = torch.randn(5, 12), torch.randn(5, 12), torch.rand(5, 12) > 0.3
    scores, first, last = best_spans(start, end, allowed, longest=3)
    for row_, (score, begin, stop) in enumerate(zip(scores, first, last, strict=True)):
        tried = {
            (float(start[row_, a] + end[row_, b]), a, b)
            for a in range(12)
            for b in range(a, min(a + 3, 12))
            if allowed[row_, a] and allowed[row_, b]
        }
        assert (score, begin, stop) == (pytest.approx(max(tried)[0]), *max(tried)[1:])


def test_logits_of_the_right_places_give_the_right_answers(tokenizer: Any) -> None:
    task = QuestionAnswering(tokenizer, longest=30, vocabulary=tokenizer.vocab_size, positions=64)
    columns = rows(tokenizer)
    assert all(not task.problem(dict(zip(columns, one, strict=True))) for one in zip(*columns.values(), strict=True))
    batch = task.collate(columns, empty=False)
    assert task.units(batch) == len(batch.labels) == sum(map(len, columns["pieces"]))
    assert set(batch.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    marked = zip(batch.inputs["input_ids"], task.learnt(batch), strict=True)
    assert [tokenizer.decode(ids[marks]) for ids, marks in marked if marks.any()] == [
        "mark and nora",
        "f. c. c.",
        "word0",
    ]
    right = {bit: ((batch.labels & bit) > 0).float() * 20 for bit in (2, 4)}
    outputs = SimpleNamespace(start_logits=right[2], end_logits=right[4])
    found = task.metrics(task.measure(outputs, batch))
    assert (found["exact_match"], found["token_f1"], found["questions"]) == (1, 1, 3)
    assert found["loss"] < 1e-3
    # What stands at padding and at the question changes nothing.
    outside = ~((batch.labels & 1).bool() | (torch.arange(batch.labels.shape[1]) == 0))
    wild = SimpleNamespace(start_logits=right[2] + outside * 99, end_logits=right[4] + outside * 99)
    assert task.loss(wild, batch) == task.loss(outputs, batch)
    assert task.metrics(task.measure(wild, batch))["exact_match"] == 1
    filler = task.collate(columns, empty=True)
    assert (task.units(filler), task.loss(outputs, filler).item(), filler.ids) == (0, 0, [])
    assert task.measure(outputs, filler)["answers"].tolist() == [0, 0, 0]


def test_what_each_window_scores_is_summed_over_the_batches(tokenizer: Any) -> None:
    task = QuestionAnswering(tokenizer, longest=30, vocabulary=tokenizer.vocab_size)
    columns = rows(tokenizer)
    draw = random.Random(0)
    logits = {number: [draw.gauss(0, 1) for _ in range(2000)] for number in range(3)}

    def measure(numbers: list[int]) -> dict[str, torch.Tensor]:
        batch = task.collate({key: [values[n] for n in numbers] for key, values in columns.items()}, empty=False)
        scores = torch.zeros(2, *batch.labels.shape)
        window = 0
        for number in numbers:
            drawn = iter(logits[number])
            for size in columns["pieces"][number]:
                scores[:, window, :size] = torch.tensor([next(drawn) for _ in range(2 * size)]).view(2, size)
                window += 1
        return task.measure(SimpleNamespace(start_logits=scores[0], end_logits=scores[1]), batch)

    whole, parts = measure([0, 1, 2]), [measure([2]), measure([1, 0])]
    for name, count in whole.items():
        assert torch.allclose(count, sum(part[name] for part in parts), rtol=1e-6)


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ("noon", [["noon"]]),
        (["noon", "at noon", "midnight"], [["noon", "at noon"]]),
        ({"text": ["noon"], "answer_start": [PASSAGE.index("noon")]}, [["noon"]]),
        ('{"text": ["noon"], "answer_start": []}', [["noon"]]),
        ([{"text": "noon"}], [["noon"]]),
    ],
)
def test_layouts_of_answers(answers: Any, found: list[list[str]]) -> None:
    given = {"q": "When?", "p": PASSAGE, "a": answers}
    row_ = json.loads(_canonical(given, "q", "p", "a"))
    assert [[text for _, text in row_["answers"]]] == found
    assert all(PASSAGE[start:].startswith(text) for start, text in row_["answers"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"a": "midnight"}, "none of their answers stands in the passage"),
        ({"a": {"text": ["noon"], "answer_start": [3]}}, "does not say 'noon' at character 3"),
        ({"a": {"text": ["noon"], "answer_start": [3, 4]}}, "1 answers and 2 places"),
        ({"a": None}, "holds no answer"),
        ({"a": "{"}, "is not JSON"),
        ({"p": " "}, "is no text"),
        ({"q": 3}, "is no text"),
    ],
)
def test_rows_without_an_answer_to_learn(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        _canonical({"q": "When?", "p": PASSAGE, "a": "noon"} | change, "q", "p", "a")
