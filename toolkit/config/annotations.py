"""Settings of data that say more of a text than its class: tags of its tokens, spans that answer a question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from toolkit.config.sections import Count, Natural, SourcesConfig


@dataclass(frozen=True)
class TagsConfig(SourcesConfig):
    """Sentences whose tokens are tagged with the names in them: where they are, and how they are split."""

    name: tuple[str, ...] = ("sample:conll2003",)
    """One source or several: `sample:NAME`, a file, folder or glob (JSONL, JSON, Parquet, or columns with a blank line
    between sentences: .conll, .bio, .iob, .txt), or a hub id."""
    tokens: str = "tokens"
    """Column with the list of a sentence's tokens. In files of columns they are the first of each line."""
    tags: str = "tags"
    """Column with the list of their tags, such as B-PER, I-PER and O. In files of columns they are the last."""
    max_length: Annotated[int, Field(ge=8, strict=True)] = 128
    """Longest sample in tokens of the model. A longer sentence goes on in another sample, not within a name."""


@dataclass(frozen=True)
class SpansConfig(SourcesConfig):
    """Questions with passages in which their answers stand: where they are, and how they are read."""

    name: tuple[str, ...] = ("sample:answer-spans",)
    """One source or several: `sample:NAME`, a file, folder or glob (JSONL, JSON, Parquet, CSV, TSV), or a hub id."""
    question: str = "question"
    """Column that holds the question."""
    passage: str = "passage"
    """Column that holds the passage."""
    answers: str = "answers"
    """Column that holds the answer, a list of them, or `text` and `answer_start` as in SQuAD. Where an answer without a
    start stands in the passage more than once, the first place is taken."""
    max_length: Annotated[int, Field(ge=32, strict=True)] = 256
    """Tokens of a window: the question, and as much of the passage as there is room for."""
    stride: Natural = 64
    """Tokens of the passage that a window has in common with the one before it."""
    answer_tokens: Count = 30
    """Tokens of the longest answer that is given."""
