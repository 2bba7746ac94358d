"""How training texts are varied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

Share = Annotated[float, Field(ge=0, lt=1)]
Spread = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class TextAugmentConfig:
    """Training texts are varied anew in each epoch; those of validation and test stay as they are."""

    delete: Share = 0.0
    """Probability that a token is left out; 0.1 is usual."""
    swap: Share = 0.0
    """As many pairs of tokens change places as this share of all; 0.05 is usual."""
    replace: Share = 0.0
    """Probability that a word of `synonyms` is replaced by another of its line."""
    synonyms: Path | None = None
    """Text file of words of one meaning, a group a line, with commas or tabs between them."""
    paraphrase: Share = 0.0
    """Probability that a text is replaced by one of its `paraphrases`."""
    paraphrases: Path | None = None
    """File (JSONL, CSV, TSV) with other wordings of training texts, in columns `text` and `paraphrase`; of its own
    translations `toolkit data back-translate` makes one."""
    mixup: Spread = 0.0
    """Let each text begin with its own tokens and end with those of another one, and mix the labels as much, by a share
    from Beta(a, a) with this a (0.2 is usual). 0 does not."""
