"""The vocabulary that is to get vectors, with the tokenizer that cuts texts into it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.config import ModelConfig, VocabularyConfig
from toolkit.data import stream_texts
from toolkit.embeddings.words import CHARACTER, Piece, pieces_of, word_tokenizer, words_in
from toolkit.errors import ConfigError, DataError
from toolkit.models import load_tokenizer


@dataclass(frozen=True)
class Target:
    """A vocabulary.

    Attributes:
        pieces: what each row is to be the vector of, by id; empty for special tokens.
        tokenizer: of transformers; its ids are those of the rows.
        counts: how often each stands in texts, where that is known.
        name: what it was made of, for people.
    """

    pieces: list[Piece]
    tokenizer: Any
    counts: list[int] | None
    name: str


def load_target(config: VocabularyConfig) -> Target:
    """Load a tokenizer, read a list of words, or count the words of texts.

    Raises:
        ConfigError: two of them are given, or a setting has no effect.
        DataError, ModelError: what is named is not there, or is malformed; the line is told.
    """
    _check(config)
    if config.tokenizer:
        tokenizer = load_tokenizer(ModelConfig(name=config.tokenizer), pads=False)
        return Target(pieces_of(tokenizer), tokenizer, None, config.tokenizer)
    if config.words:
        listed = read_words(config.words)
        known = any(count is not None for count in listed.values())
        return _of_words({word: count or 1 for word, count in listed.items()}, config, str(config.words), known)
    return _of_words(count_words(config), config, ", ".join(config.texts), True)


def count_words(config: VocabularyConfig) -> dict[str, int]:
    """The most frequent words, and then the Chinese characters that they consist of."""
    counts: Counter[str] = Counter()
    for text in stream_texts(config.texts, config.text):
        counts.update(words_in(text, config.lowercase, config.words_in == "characters"))
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    chosen = {word: count for word, count in ranked[: config.size] if count >= config.min_count}
    if not chosen:
        raise DataError(
            f"no word stands {config.min_count} times in {', '.join(config.texts)}", "Lower --vocabulary.min_count."
        )
    characters = sorted({char for word in chosen for char in word if CHARACTER.fullmatch(char)} - set(chosen))
    return chosen | {char: max(1, counts[char]) for char in characters}


def read_words(file: Path) -> dict[str, int | None]:
    """The words of a file, each maybe with a count behind a tab.

    Raises:
        DataError: the file cannot be read, or a line has no word, a word that stands earlier, or a count that is none.
    """
    words: dict[str, int | None] = {}
    try:
        with file.expanduser().open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                word, tab, count = line.rstrip("\r\n").partition("\t")
                where = f"{file}, line {number}"
                if not word.strip():
                    raise DataError(f"{where}: there is no word", "Write one word a line.")
                if word in words:
                    raise DataError(f"{where}: {word!r} stands in an earlier line", "Keep one of the two.")
                if tab and (not count.strip().isdigit() or int(count) == 0):
                    raise DataError(f"{where}: {count!r} is no count", "Write a whole number behind the tab, or none.")
                words[word] = int(count) if tab else None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", "Check --vocabulary.words.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error.reason}", "Convert it.") from error
    if not words:
        raise DataError(f"{file} is empty", "Write one word a line.")
    return words


def _of_words(words: dict[str, int], config: VocabularyConfig, name: str, counted: bool) -> Target:
    tokenizer = word_tokenizer(words, config.lowercase)
    pieces = pieces_of(tokenizer)
    counts = [words.get(piece.text, 0) for piece in pieces] if counted else None
    return Target([Piece(piece.text) for piece in pieces], tokenizer, counts, name)


def _check(config: VocabularyConfig) -> None:
    if config.tokenizer and config.words:
        raise ConfigError("--vocabulary.tokenizer and --vocabulary.words are both given", "Give one of the two.")
    given, unset = "--vocabulary." + ("tokenizer" if config.tokenizer else "words"), VocabularyConfig()
    unread = ("text", "words_in", "size", "min_count", *(("lowercase",) if config.tokenizer else ()))
    for key in unread if config.tokenizer or config.words else ():
        if getattr(config, key) != getattr(unset, key):
            raise ConfigError(f"--vocabulary.{key} has no effect beside {given}", "Drop one of the two.")
    if not config.texts and not config.tokenizer and not config.words:
        raise ConfigError("there is no vocabulary", "Give --vocabulary.tokenizer, words or texts.")
