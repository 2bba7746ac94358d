"""Settings of sentence embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from toolkit.config.sections import Positive, SourcesConfig


@dataclass(frozen=True)
class AnchorsConfig(SourcesConfig):
    """Pairs of texts that belong together: where they are, or how they are made of texts."""

    name: tuple[str, ...] = ("sample:bbc-news",)
    """One source or several: `sample:NAME`, a file, folder or glob (JSONL, JSON, CSV, TSV, Parquet), or a hub id."""
    pair: Literal["columns", "headline", "halves"] = "halves"
    """What a pair is: two `columns` of a row; or of one text its first line and the rest (`headline`), or what stands
    before and behind the end of the sentence nearest to its middle (`halves`)."""
    anchor: str = "anchor"
    """Column of the text that is looked for with (a question)."""
    positive: str = "positive"
    """Column of the text that is to be found (its answer)."""
    negative: str = "negative"
    """Column of a text that is not to be found though it is much like it; a row may lack it."""
    text: str = "text"
    """Column of the text that a pair is made of, where it is not of two columns."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share held out for validation where no validation split is given."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share held out for the test where no test split is given."""
    max_length: Annotated[int, Field(ge=3, strict=True)] = 64
    """Longest text in tokens; the rest of it is cut off."""


@dataclass(frozen=True)
class ContrastConfig:
    """How an encoder learns which texts belong together."""

    pooling: Literal["mean", "cls"] = "mean"
    """The vector of a text: the mean over its tokens, or its first token."""
    temperature: Positive = 0.05
    """Similarities (cosines) are divided by it: the smaller, the more the nearest negatives count."""
