"""Where vectors come from: a model's input embedding, what a model makes of words, or a file of word vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from toolkit.config import ModelConfig, VectorsConfig
from toolkit.data import stream_texts
from toolkit.embeddings.contexts import Encoder, alone, in_texts
from toolkit.embeddings.files import SUFFIXES, read_vectors
from toolkit.embeddings.table import Table
from toolkit.embeddings.targets import Target
from toolkit.embeddings.words import Piece, fold, parts, pieces_of
from toolkit.encoders import load_encoder
from toolkit.errors import ConfigError, DataError
from toolkit.models import load_tokenizer

Progress = Callable[[str, int, int], None]
"""Told what is done, how much of it, and how much there is (0: not known)."""


def vectors_for(
    target: Target, config: VectorsConfig, on_progress: Progress = lambda title, done, total: None
) -> Table:
    """The vectors of a source, as far as a target can have use for them.

    Raises:
        ConfigError: a setting that has no effect on this source.
        DataError, ModelError: it is not there, or malformed.
    """
    file = Path(config.name).expanduser()
    if file.is_file() or file.suffix.lower() in SUFFIXES:
        _check_file(config)
        return _of_file(file, target, on_progress)
    _check_corpus(config)
    named = ModelConfig(name=config.name, revision=config.revision)
    tokenizer = load_tokenizer(named, pads=config.take != "input")
    model: Any = load_encoder(named, seed=0).eval()
    name = f"{config.name} ({config.take})"
    if config.take == "input":
        return _of_input(model, tokenizer, name)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    encoder = Encoder(model, tokenizer, config.batch, config.max_length)
    done = 0

    def on_done(count: int) -> None:
        nonlocal done
        done += count
        on_progress("words read by the model" if config.take == "alone" else "texts read by the model", done, total)

    if config.take == "alone":
        total = len({piece.text for piece in target.pieces if piece.text})
        return alone(encoder, target.pieces, name, on_done)
    texts = list(stream_texts(config.corpus, config.text))
    total = len(texts)
    table = in_texts(encoder, target.tokenizer, texts, occurrences=config.occurrences, name=name, on_done=on_done)
    by_name = {piece.text: row for row, piece in enumerate(table.pieces)}
    names = target.tokenizer.convert_ids_to_tokens(list(range(len(target.pieces))))
    rows = [(by_name[token], piece) for token, piece in zip(names, target.pieces, strict=True) if token in by_name]
    vectors = table.vectors[[row for row, _ in rows]]
    return Table(vectors, [piece for _, piece in rows], lambda piece: (), name, table.facts)


def _of_input(model: Any, tokenizer: Any, name: str) -> Table:
    weights = model.get_input_embeddings().weight.detach().float()
    pieces = pieces_of(tokenizer)[: len(weights)]
    special = {*tokenizer.all_special_ids}

    def split(piece: Piece) -> Sequence[int]:
        # With a space before it, where a tokenizer tells beginnings of words from their insides.
        ids = tokenizer(piece.text, add_special_tokens=False, verbose=False)["input_ids"]
        return [token for token in ids if token not in special and pieces[token].text]

    return Table(weights, pieces, split, name)


def _of_file(file: Path, target: Target, on_progress: Progress) -> Table:
    texts = {piece.text for piece in target.pieces if piece.text}
    wanted = texts | {part for text in texts for part in parts(text)}
    folded = {fold(text) for text in wanted}
    size = file.stat().st_size if file.is_file() else 0
    found = read_vectors(
        file,
        lambda word: word in wanted or fold(word) in folded,
        lambda done: on_progress("bytes of word vectors", done, size),
    )
    if not found.words:
        raise DataError(
            f"not one of the {len(texts):,} words of {target.name} is among the {found.read:,} of {file}",
            "Are they of the same language, and written in the same way?",
        )
    rows = {word: row for row, word in enumerate(found.words)}
    loose = {fold(word): row for row, word in reversed(list(enumerate(found.words)))}

    def split(piece: Piece) -> Sequence[int]:
        either = (rows.get(part, loose.get(fold(part))) for part in parts(piece.text))
        return [row for row in either if row is not None]

    facts = {"words_read": found.read, "repeated": found.repeated, "not_utf8": found.undecodable}
    return Table(torch.from_numpy(found.vectors), [Piece(word) for word in found.words], split, file.name, facts)


def _check_file(config: VectorsConfig) -> None:
    unset = VectorsConfig()
    for key in ("revision", "take", "corpus", "text", "occurrences", "max_length", "batch"):
        if getattr(config, key) != getattr(unset, key):
            raise ConfigError(f"--vectors.{key} has no effect on the file {config.name}", "Drop it, or name a model.")


def _check_corpus(config: VectorsConfig) -> None:
    if config.take == "contextual" and not config.corpus:
        raise ConfigError("--vectors.take contextual needs texts to read", "Give --vectors.corpus.")
    unset = VectorsConfig()
    for key in ("corpus", "text", "occurrences") if config.take != "contextual" else ():
        if getattr(config, key) != getattr(unset, key):
            raise ConfigError(
                f"--vectors.{key} has no effect on --vectors.take {config.take}", "Use --vectors.take contextual."
            )
