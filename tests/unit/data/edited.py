"""Texts of known likeness, in English and Chinese, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from toolkit.config import CorpusConfig
from toolkit.data import TextCorpus, text_corpus
from toolkit.data.files import ROLES

LENGTH = {"english": 200, "chinese": 300}
"""Words or characters of a text."""
RUN = {"english": 5, "chinese": 9}
"""Words or characters of a run; Chinese says in 9 what English says in 5 words."""


def text(script: str, number: int, edits: int = 0) -> str:
    """A text that shares no run with one of another number.

    Args:
        script: english or chinese.
        number: which one.
        edits: words or characters that are others, far from each other: each changes as many runs as it lies in.
    """
    if script == "english":
        words = [f"w{number}x{place}" for place in range(LENGTH[script])]
        other = [f"e{number}x{place}" for place in range(edits)]
    else:
        words = [chr(0x4E00 + (number * 37 + place * 61 + place * place * 7) % 8000) for place in range(LENGTH[script])]
        other = [chr(0x4E00 + 10_000 + (number * 31 + place) % 9_000) for place in range(edits)]
    for place, word in enumerate(other):
        words[20 + place * 12] = word
    return (" " if script == "english" else "").join(words)


def likeness(script: str, edits: int) -> float:
    """Jaccard similarity of a text and a copy with so many edits."""
    runs = LENGTH[script] - RUN[script] + 1
    changed = edits * RUN[script]
    return (runs - changed) / (runs + changed)


def similarity(one: str, other: str, script: str) -> float:
    """The same, counted."""
    first, second = (
        _runs(list(found) if script == "chinese" else found.split(), RUN[script]) for found in (one, other)
    )
    return len(first & second) / len(first | second)


def _runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[begin : begin + length]) for begin in range(len(words) - length + 1)}


def write(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def cleaned(name: Path | tuple[Path, ...], **settings: Any) -> TextCorpus:
    """With larger held-out shares than by default, so that few texts are enough."""
    names = name if isinstance(name, tuple) else (name,)
    given: dict[str, Any] = {"validation_share": 0.2, "test_share": 0.2}
    given |= {key: (str(value),) if isinstance(value, Path) else value for key, value in settings.items()}
    return text_corpus(CorpusConfig(name=tuple(map(str, names)), **given))


def all_texts(corpus: TextCorpus) -> list[str]:
    return [text for role in ROLES for text in corpus.splits[role]["text"]]
