"""Sections of recipes that write one text for another: translations, summaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from toolkit.config.sections import Count, SourcesConfig


@dataclass(frozen=True)
class TextPairsConfig(SourcesConfig):
    """Texts with what is to be written for each: where they are, and to how many tokens they are cut."""

    name: tuple[str, ...] = ("sample:homeassistant-zh",)
    """One source or several: `sample:NAME`, a file, folder or glob (JSONL, JSON, CSV, TSV, Parquet), a hub id, or two
    text files of as many lines with a comma between, as `train.en,train.zh`, whose columns are `source` and
    `target`."""
    source: str = "source"
    """Column of the text that is given."""
    target: str = "target"
    """Column of the text that is to be written."""
    max_length: Annotated[int, Field(ge=4, strict=True)] = 64
    """Tokens of the longest source; the rest of one is cut off."""
    max_target_length: Annotated[int, Field(ge=4, strict=True)] = 64
    """Tokens of the longest target; the rest of one is cut off."""


@dataclass(frozen=True)
class TranslationConfig(TextPairsConfig):
    """Texts with their translations."""

    source_lang: str | None = None
    """Language of the sources as the tokenizer calls it, for a pretrained model of many languages that wants to be
    told: `eng_Latn` (NLLB), `en_XX` (mBART), `en` (M2M100)."""
    target_lang: str | None = None
    """Language of the targets, likewise: `zho_Hans`, `zh_CN`, `zh`."""
    prefix: str = ""
    """Put before each source, for a pretrained model that wants to be told by words: `translate English to German: `
    (T5)."""


@dataclass(frozen=True)
class SummaryConfig(TextPairsConfig):
    """Texts with their summaries, or headlines."""

    name: tuple[str, ...] = ("sample:bbc-headlines",)
    """One source or several: `sample:NAME`, a file, folder or glob (JSONL, JSON, CSV, TSV, Parquet), a hub id, or two
    text files of as many lines with a comma between, as `articles.txt,headlines.txt`, whose columns are `source` and
    `target`."""
    max_length: Annotated[int, Field(ge=4, strict=True)] = 160
    """Tokens of the longest text; the rest of one is cut off."""
    max_target_length: Annotated[int, Field(ge=4, strict=True)] = 32
    """Tokens of the longest summary; the rest of one is cut off."""
    instruction: str = "Write a headline of three to six words for this news article."
    """What a chat model is asked, before each text. An encoder–decoder is given the text alone."""


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """The encoder–decoder to train: a new one of these sizes (pre-norm, as mBART), or one to go on from."""

    name: str | None = None
    """Weights to go on from: a local folder, or a hub id (T5, mT5, BART, mBART, Marian, NLLB, M2M100). Its sizes are
    its own. By default a new network."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    layers: Count = 2
    """Blocks of a new network's encoder, and of its decoder."""
    hidden_size: Count = 256
    """Width of a new network."""
    heads: Count = 4
    """Attention heads of a block."""
    mlp_size: Count | None = None
    """Inner width of a feed-forward layer. By default 4 times the width."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Overrides every dropout probability of the network (0.1 in a new one)."""
    freeze: tuple[str, ...] = ()
    """Regular expressions; a parameter whose name one of them matches (anywhere) is not trained."""
    attention: Literal["sdpa", "eager"] | None = None
    """Attention implementation of transformers. By default sdpa for the networks that have it, else eager."""


@dataclass(frozen=True)
class DecodeConfig:
    """How texts are written for the test split, before and after training."""

    beams: Count = 1
    """Beginnings that are kept at a time (beam search); 1 takes the likeliest token each time (greedy)."""
    length_penalty: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Exponent of the length by which beam search divides a text's log-probability (default 1); larger: longer texts.
    For several beams."""
    show: Annotated[int, Field(ge=0, strict=True)] = 6
    """Texts of the test split that are shown with what was written for them."""
