"""Tagged tokens: from rows or columns to token ids with a label for each word, on the first of its sub-words."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Features, Value
from datasets import Sequence as ListOf

from toolkit.config import TagsConfig
from toolkit.data.entities import bio, blanks_before, entities, is_tag, labels_of
from toolkit.data.examples import Examples, examples
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.rows import Unfit, gather_rows, write
from toolkit.data.text_corpus import TextCorpus
from toolkit.data.tokenize import tokenizer_fingerprint
from toolkit.errors import ConfigError, DataError

IGNORED = -100
"""Label of a token that has none: a special one, or a later sub-word of a word."""
_REVISION = 1
"""To be raised with every change of this module that changes its result: older caches are then not used."""
_WHAT = ("tagged sentences", "name their columns with --data.tokens and --data.tags")
_FEATURES = Features({"input_ids": ListOf(Value("int32")), "labels": ListOf(Value("int16")), "length": Value("int32")})
_KINDS = "kinds.json"


def tagged_tokens(config: TagsConfig) -> TextCorpus:
    """Read, check, clear of repeats and split; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks. The texts of the result are for `token_tags`.

    Raises:
        ConfigError: a setting that cannot take effect or is out of range.
        DataError: data that is missing, or of which too many rows are no tagged sentences.
    """
    canonical = functools.partial(_canonical, tokens=config.tokens, tags=config.tags)
    settings = {"kind": "tags", "revision": _REVISION, "tokens": config.tokens, "tags": config.tags}
    of_lines = functools.partial(_of_columns, tokens=config.tokens, tags=config.tags)
    return gather_rows(config, canonical, _WHAT, settings, _said, of_lines=of_lines)


def tag_labels(corpus: TextCorpus) -> tuple[str, ...]:
    """The labels of a corpus: `O`, and B and I of each type of name in its training split, sorted.

    Raises:
        DataError: there are no names, or validation or test has a type that training lacks.
    """
    name = fingerprint("kinds", _REVISION, corpus.fingerprint)
    kinds = prepared(name, _load_kinds, functools.partial(_find_kinds, corpus))
    if not kinds["train"]:
        raise DataError("no token of the training data is tagged as a name", "Give the tags with --data.tags.")
    for split in ("validation", "test"):
        if strange := sorted({*kinds[split]} - {*kinds["train"]}):
            raise DataError(
                f"the {split} split has names of type {', '.join(strange[:5])}, of which the training data has none",
                "Correct the tags, or add training sentences with such names.",
            )
    return labels_of(kinds["train"])


def token_tags(config: TagsConfig, corpus: TextCorpus, labels: Sequence[str], tokenizer: Any) -> Examples:
    """Cut into sub-words; the second call with the same content loads the result.

    Returns:
        Columns: `input_ids` (list of int, special tokens included), `labels` (list of int, as many: an index into
        `labels` on the first sub-word of each word, elsewhere `IGNORED`), `length` (int), `id` (int).

    Raises:
        ConfigError: a length that leaves no room, or weights that are not one for each source.
        DataError: a split has nothing left.
    """
    before, after = frame(tokenizer)
    room = config.max_length - len(before) - len(after)
    if room < 1:
        raise ConfigError(f"--data.max_length {config.max_length} leaves no room beside special tokens", "Raise it.")
    encode = functools.partial(_encode, labels=tuple(labels), tokenizer=tokenizer, room=room)
    settings = ["tags", _REVISION, tokenizer_fingerprint(tokenizer), config.max_length, list(labels)]
    return examples(config, corpus, encode, _FEATURES, settings)


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and behind a text."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    begin = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return whole[:begin], whole[begin + len(plain) :]


def sub_words(words: Sequence[str], blanks: Sequence[bool], tokenizer: Any) -> list[list[int]]:
    """The token ids of each word, one at least.

    Args:
        words: of one text.
        blanks: whether each stands behind a blank, which a vocabulary may hold as part of a word.
        tokenizer: of transformers.
    """
    texts = [f" {word}" if blank else word for word, blank in zip(words, blanks, strict=True)]
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]
    result = []
    for ids, blank in zip(found, blanks, strict=True):
        # Some tokenizers put a blank before every text that they are given: here it would stand between characters.
        if not blank and len(ids) > 1 and tokenizer.convert_ids_to_tokens(ids[0]) == "▁":
            ids = ids[1:]
        result.append(ids or [tokenizer.unk_token_id or 0])
    return result


def pieces(sizes: Sequence[int], room: int, stops: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Words as pieces of at most `room` sub-words: first word of each, and the word behind its last one.

    Args:
        sizes: sub-words of each word; a word that is larger than the room is a piece of its own.
        room: of a piece.
        stops: whether a piece may begin with each word; where none may, it begins with any.
    """
    begin = 0
    while begin < len(sizes):
        end, filled = begin, 0
        while end < len(sizes) and (end == begin or filled + sizes[end] <= room):
            filled += sizes[end]
            end += 1
        if end < len(sizes):
            end = next((at for at in range(end, begin, -1) if stops[at]), end)
        yield begin, end
        begin = end


def _canonical(row: Mapping[str, Any], tokens: str, tags: str) -> str:
    words, marks = (_strings(row, column) for column in (tokens, tags))
    if len(words) != len(marks):
        raise Unfit(f"they have {len(words)} tokens and {len(marks)} tags")
    if strange := next((mark for mark in marks if not is_tag(mark)), None):
        raise Unfit(f"the tag '{strange:.40}' is neither O nor one like B-PER or I-PER")
    # Names in one scheme, whatever they were written in: the same sentences are then the same text.
    return write({"tokens": words, "tags": bio(entities(marks), len(words))})


def _strings(row: Mapping[str, Any], column: str) -> list[str]:
    if column not in row:
        raise Unfit(f"they have no column '{column}' but {', '.join(map(str, row))}")
    value = row[column]
    if isinstance(value, list) and value and all(isinstance(word, int) for word in value):
        raise Unfit(f"their column '{column}' holds numbers: write the names of the tags in their place")
    if not isinstance(value, list) or not all(isinstance(word, str) and word.strip() for word in value):
        raise Unfit(f"their column '{column}' is no list of words")
    if not value:
        raise Unfit(f"their column '{column}' is empty")
    return value


def _of_columns(lines: Iterable[str], tokens: str, tags: str) -> Iterator[Mapping[str, Any] | Unfit]:
    """Of lines of columns, with a blank one between sentences; `-DOCSTART-` lines say where an article begins."""
    words: list[str] = []
    marks: list[str] = []
    fault = ""
    for number, line in enumerate([*lines, ""], start=1):
        columns = line.split()
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                fault = fault or f"line {number} has one column only: '{columns[0]:.40}'"
            words.append(columns[0])
            marks.append(columns[-1])
        elif words:
            yield Unfit(fault) if fault else {tokens: words, tags: marks}
            words, marks, fault = [], [], ""


def _said(text: str) -> str:
    return " ".join(json.loads(text)["tokens"])


def _find_kinds(corpus: TextCorpus, result: Path, scratch: Path) -> None:
    kinds = {
        split: sorted({tag[2:] for text in rows["text"] for tag in json.loads(text)["tags"] if tag != "O"})
        for split, rows in corpus.splits.items()
    }
    (result / _KINDS).write_text(json.dumps(kinds, ensure_ascii=False), encoding="utf-8")


def _load_kinds(folder: Path) -> dict[str, list[str]] | None:
    try:
        return json.loads((folder / _KINDS).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def _encode(row: Mapping[str, Any], *, labels: Sequence[str], tokenizer: Any, room: int) -> list[dict[str, Any]]:
    words, tags = row["tokens"], row["tags"]
    ids = sub_words(words, blanks_before(words), tokenizer)
    code = {label: index for index, label in enumerate(labels)}
    before, after = frame(tokenizer)
    rows = []
    for begin, end in pieces(list(map(len, ids)), room, [not tag.startswith("I-") for tag in tags]):
        tokens = [token for word in ids[begin:end] for token in word][:room]
        marks = [m for i in range(begin, end) for m in (code[tags[i]], *[IGNORED] * (len(ids[i]) - 1))][:room]
        rows.append(
            {
                "input_ids": [*before, *tokens, *after],
                "labels": [*[IGNORED] * len(before), *marks, *[IGNORED] * len(after)],
                "length": len(before) + len(tokens) + len(after),
            }
        )
    return rows
