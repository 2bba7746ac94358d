"""Questions with passages in which the answer stands: from rows to windows of tokens, with where the answer is."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Features, Value
from datasets import Sequence as ListOf

from toolkit.config import SpansConfig
from toolkit.data.examples import Examples, examples
from toolkit.data.rows import Unfit, gather_rows, write
from toolkit.data.text_corpus import TextCorpus
from toolkit.data.tokenize import tokenizer_fingerprint
from toolkit.errors import ConfigError

_REVISION = 1
"""To be raised with every change of this module that changes its result: older caches are then not used."""
_WHAT = (
    "questions with passages and answers",
    "name their columns with --data.question, --data.passage and --data.answers",
)
_INTS = ListOf(Value("int32"))
_FEATURES = Features(
    {
        **dict.fromkeys(("input_ids", "segments", "begins", "ends", "pieces", "first", "last"), _INTS),
        "passage": Value("string"),
        "answers": ListOf(Value("string")),
        "length": Value("int32"),
    }
)


@dataclass(frozen=True)
class Window:
    """A question and a part of a passage, as a model reads them.

    Attributes:
        input_ids: of both, special tokens included.
        segments: which of the two each token is of, where the model reads that; else zeros.
        begins, ends: of each token, where its text lies in the passage; −1 for all that is not of the passage.
    """

    input_ids: list[int]
    segments: list[int]
    begins: list[int]
    ends: list[int]

    def find(self, begin: int, end: int) -> tuple[int, int]:
        """First and last token of a stretch of the passage; 0 and 0, the first token, where it is not all here."""
        inside = [at for at, stop in enumerate(self.ends) if stop > begin and 0 <= self.begins[at] < end]
        whole = inside and self.begins[inside[0]] <= begin and self.ends[inside[-1]] >= end
        return (inside[0], inside[-1]) if whole else (0, 0)


def answered_questions(config: SpansConfig) -> TextCorpus:
    """Read, check, clear of repeats and split; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks. The texts of the result are for `answer_spans`.

    Raises:
        ConfigError: a setting that cannot take effect or is out of range.
        DataError: data that is missing, or of which too many rows have no answer that stands in the passage.
    """
    columns = {key: getattr(config, key) for key in ("question", "passage", "answers")}
    settings = {"kind": "spans", "revision": _REVISION, **columns}
    return gather_rows(config, functools.partial(_canonical, **columns), _WHAT, settings, _said)


def answer_spans(config: SpansConfig, corpus: TextCorpus, tokenizer: Any) -> Examples:
    """Cut into windows; the second call with the same content loads the result.

    Returns:
        A question a row, its windows end to end: `input_ids`, `segments`, `begins`, `ends` (lists of int, as
        `Window`), `pieces` (their lengths), `first` and `last` (of each window, as `Window.find`), `passage`,
        `answers` (list of string), `length` (int), `id` (int).

    Raises:
        ConfigError: a stride that leaves no room, a slow tokenizer, or weights that are not one for each source.
        DataError: too many questions fill half a window, or a split has none left.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            "the tokenizer is not of the library tokenizers, so that it cannot say where in a passage a token is",
            "Take a model with a tokenizer.json.",
        )
    room = config.max_length // 2 - tokenizer.num_special_tokens_to_add(pair=True)
    if config.stride >= room:
        raise ConfigError(
            f"--data.stride {config.stride} may leave windows of --data.max_length {config.max_length} tokens nothing "
            "new, beside a question",
            f"Use at most {room - 1}, or longer windows.",
        )
    encode = functools.partial(_encode, tokenizer=tokenizer, length=config.max_length, stride=config.stride)
    settings = ["spans", _REVISION, tokenizer_fingerprint(tokenizer), config.max_length, config.stride]
    return examples(config, corpus, encode, _FEATURES, settings)


def windows(question: str, passage: str, tokenizer: Any, *, length: int, stride: int) -> list[Window]:
    """A question with each part of a passage; neighbouring parts have `stride` tokens in common.

    Args:
        question, passage: of which the first may fill half a window.
        tokenizer: a fast one.
        length: of a window, at most.
        stride: less than half of it.

    Raises:
        Unfit: the question is too long.
    """
    asked = len(tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
    if asked > length // 2:
        raise Unfit(f"their question has {asked} tokens, of which a window takes {length // 2}")
    found = tokenizer(
        question,
        passage,
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids="token_type_ids" in tokenizer.model_input_names,
        verbose=False,
    )
    result = []
    for number, ids in enumerate(found["input_ids"]):
        of_passage = [sequence == 1 for sequence in found.sequence_ids(number)]
        offsets = found["offset_mapping"][number]
        begins, ends = (
            [offset[place] if mine else -1 for offset, mine in zip(offsets, of_passage, strict=True)]
            for place in (0, 1)
        )
        segments = found["token_type_ids"][number] if "token_type_ids" in found else [0] * len(ids)
        result.append(Window(ids, segments, begins, ends))
    return result


def _canonical(row: Mapping[str, Any], question: str, passage: str, answers: str) -> str:
    asked, text = (_text(row, column) for column in (question, passage))
    found = [[start, answer] for answer, said in _answers(row, answers) if (start := _start(answer, said, text)) >= 0]
    if not found:
        raise Unfit("none of their answers stands in the passage")
    return write({"question": asked, "passage": text, "answers": found})


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise Unfit(f"they have no column '{column}' but {', '.join(map(str, row))}")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise Unfit(f"their column '{column}' is no text")
    return value


def _answers(row: Mapping[str, Any], column: str) -> Iterator[tuple[str, int | None]]:
    """Each answer, and where it is said to begin."""
    value = row.get(column)
    if isinstance(value, str) and value.startswith(("{", "[")):  # as tables of CSV hold it
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise Unfit(f"their column '{column}' is not JSON") from None
    if isinstance(value, dict):
        texts, starts = (value.get(key) or [] for key in ("text", "answer_start"))
        if starts and len(starts) != len(texts):
            raise Unfit(f"they have {len(texts)} answers and {len(starts)} places of answers")
        value = [{"text": text, "answer_start": starts[at] if starts else None} for at, text in enumerate(texts)]
    for answer in value if isinstance(value, list) else [value]:
        text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (answer, None)
        if not isinstance(text, str) or not text.strip():
            raise Unfit(f"their column '{column}' holds no answer")
        yield text.strip() if start is None else text, start


def _start(answer: str, start: int | None, passage: str) -> int:
    if start is None:
        return passage.find(answer)
    if passage[start : start + len(answer)] != answer:
        raise Unfit(f"their passage does not say '{answer:.40}' at character {start}")
    return start


def _said(text: str) -> str:
    row = json.loads(text)
    return f"{row['question']}\n{row['passage']}"


def _encode(row: Mapping[str, Any], *, tokenizer: Any, length: int, stride: int) -> list[dict[str, Any]]:
    found = windows(row["question"], row["passage"], tokenizer, length=length, stride=stride)
    start, answer = row["answers"][0]
    places = [window.find(start, start + len(answer)) for window in found]
    flat = {
        key: [value for window in found for value in getattr(window, key)]
        for key in ("input_ids", "segments", "begins", "ends")
    }
    return [
        {
            **flat,
            "pieces": [len(window.input_ids) for window in found],
            "first": [first for first, _ in places],
            "last": [last for _, last in places],
            "passage": row["passage"],
            "answers": [text for _, text in row["answers"]],
            "length": len(flat["input_ids"]),
        }
    ]
