"""Settings of matrices of word embeddings, and of classifiers over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from toolkit.config.sections import Count, Natural


@dataclass(frozen=True)
class VocabularyConfig:
    """The vocabulary that is to get vectors: that of a tokenizer, a list of words, or the words of texts."""

    tokenizer: str | None = None
    """A tokenizer: `sample:NAME`, a local folder, or a hub id. The matrix has a row for each of its ids."""
    words: Path | None = None
    """A file of words, one a line, maybe with a count behind a tab. The matrix has their rows in this order."""
    texts: tuple[str, ...] = ("sample:bbc-news",)
    """Texts of which the words are counted, where neither of the two is given: samples, files, folders or hub ids."""
    text: str = "text"
    """Column that holds the texts."""
    words_in: Literal["spaces", "characters"] = "spaces"
    """What a word of `texts` is: what stands between spaces and punctuation (Chinese must then be cut into words
    already), or the same with each Chinese character a word."""
    size: Count = 20_000
    """Take the most frequent words of `texts`, so many at most; the Chinese characters they consist of come on top."""
    min_count: Count = 2
    """Take words of `texts` that stand there so often."""
    lowercase: bool = True
    """Let words be lower case, in the vocabulary and in the texts that are cut into them."""


@dataclass(frozen=True)
class VectorsConfig:
    """Where the vectors come from: a model, or a file of word vectors."""

    name: str = "sample:minilm"
    """A model (`sample:NAME`, a local folder, or a hub id), or a file of word vectors as word2vec and GloVe write them:
    text (.txt, .vec, .gz) or binary (.bin)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    take: Literal["input", "alone", "contextual"] = "input"
    """Of a model: the rows of its input embedding, its last layer over each word by itself, or that over the places
    where the word stands in `corpus`, averaged."""
    corpus: tuple[str, ...] = ()
    """Texts for `contextual`: samples, files, folders or hub ids."""
    text: str = "text"
    """Column that holds them."""
    occurrences: Count = 20
    """Places of a word in `corpus` that are averaged, at most."""
    max_length: Annotated[int, Field(ge=3, strict=True)] = 128
    """Tokens of a text of `corpus` that are read."""
    batch: Count = 32
    """Texts of one forward pass."""


@dataclass(frozen=True)
class MatrixConfig:
    """How the two are brought together, and what is written."""

    output: Path = Path("matrices/words")
    """Folder to write to."""
    fold: bool = True
    """Where a word has no vector, take that of the same word in other case or width (`Ａ`, `A`, `a`)."""
    compose: bool = True
    """Where it still has none, take the mean over the pieces that the source cuts it into."""
    dimension: Count | None = None
    """Reduce the vectors to so many features (principal components of those that were found)."""
    seed: Natural = 0
    """Of the rows that are drawn, around the mean of the others and as spread out."""
    neighbours: tuple[str, ...] = ()
    """Words whose nearest neighbours are shown. By default a few frequent ones."""


@dataclass(frozen=True)
class WordModelConfig:
    """A classifier over the mean of word vectors."""

    name: str = "sample:minilm"
    """Where the vectors are: a folder that recipes/embedding_matrix.py has written, or a model, whose own tokenizer and
    input embedding are then taken."""
    hidden_size: Count = 128
    """Width of the layer between the mean and the classes."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout probability of words (whole ones), and of what comes out of that layer."""
    embedding: Literal["tuned", "frozen"] = "tuned"
    """Whether the vectors are trained along."""
