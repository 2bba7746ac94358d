"""Texts with what is to be written for each: strings of an interface with their translations, articles and headlines.

A row of `data.jsonl` is a `source` and a `target`. Of a source that has several targets the most frequent one is kept,
so that none is tested on that was trained on with another; rows are sorted by their source.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from toolkit.samples._converters import ROWS_FILE, bbc_texts

Pair = tuple[str, str]


def _homeassistant(unpacked: Path, target: Path, language: str) -> None:
    """The strings that each component of Home Assistant has in English, and in this language under the same key."""

    def pairs() -> Iterator[Pair]:
        for english in (unpacked / "homeassistant" / "components").glob("*/translations/en.json"):
            translated = english.with_name(f"{language}.json")
            if translated.exists():
                of_key = dict(_strings(translated))
                yield from ((text, of_key[key]) for key, text in _strings(english) if key in of_key)

    _write_pairs(target, pairs())


homeassistant_zh = partial(_homeassistant, language="zh-Hans")
homeassistant_de = partial(_homeassistant, language="de")


def bbc_headlines(unpacked: Path, target: Path) -> None:
    """The paragraphs of each article, and its first line, which is its headline."""

    def pairs() -> Iterator[Pair]:
        for text, _ in bbc_texts(unpacked):
            headline, _, body = text.partition("\n")
            yield body.strip(), headline.strip()

    _write_pairs(target, pairs())


def _strings(file: Path) -> Iterator[tuple[tuple[str, ...], str]]:
    def inside(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
        if isinstance(value, dict):
            for key, child in value.items():
                yield from inside(child, (*path, key))
        elif isinstance(value, str):
            yield path, value.strip()

    return inside(json.loads(file.read_text(encoding="utf-8")), ())


def _write_pairs(target: Path, pairs: Iterable[Pair]) -> None:
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for source, text in pairs:
        if source and text:
            found[source][text] += 1
    with (target / ROWS_FILE).open("w", encoding="utf-8", newline="\n") as file:
        for source, texts in sorted(found.items()):
            text = min(texts, key=lambda one: (-texts[one], one))
            file.write(json.dumps({"source": source, "target": text}, ensure_ascii=False) + "\n")
