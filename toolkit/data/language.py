"""Texts as sequences of tokens for a language model: each text framed, cut where it is too long, and packed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from toolkit.config import CorpusConfig
from toolkit.data.files import ROLES, Role
from toolkit.data.mapping import map_texts, quiet
from toolkit.data.mixture import Mixture, check_weights, count_sources, mixed
from toolkit.data.packing import cut, pack
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.stored import load_splits, save_splits
from toolkit.data.text_corpus import TextCorpus
from toolkit.data.tokenize import EDGES, length_histogram, tokenizer_fingerprint
from toolkit.errors import ConfigError

_REVISION = 2
"""To be raised with every change of this package that changes its result: older caches are then not used."""


@dataclass(frozen=True)
class LanguageData:
    """Sequences of tokens in three splits.

    Attributes:
        train: columns `input_ids` (list of int, the pieces end to end), `pieces` (list of int, their lengths),
            `bytes` (int, of the texts that begin here, in UTF-8), `length` (int, of `input_ids`), `id` (int).
        validation: the same.
        test: the same.
        facts: what was read, dropped, cut, packed and is to be warned of; fit for JSON.
        fingerprint: of texts, settings and tokenizer; the same on every machine.
    """

    train: Dataset | Mixture
    validation: Dataset
    test: Dataset
    facts: dict[str, Any]
    fingerprint: str


def language(config: CorpusConfig, corpus: TextCorpus, tokenizer: Any) -> LanguageData:
    """Tokenise and pack; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks, as `text_corpus`.

    Raises:
        ConfigError: weights that are not one for each source, or a tokenizer without an end token.
        DataError: a source has no tokens.
    """
    check_weights(config)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end token, so that the model could not learn where a text ends",
            "Name an `eos_token` in its tokenizer_config.json, or take another with --tokenizer.name.",
        )
    name = fingerprint("sequences", _REVISION, corpus.fingerprint, tokenizer_fingerprint(tokenizer), config.max_length)
    splits, facts = prepared(name, load_splits, functools.partial(_prepare, config, corpus, tokenizer))
    train, passes = mixed(splits["train"], facts["sequences_of_source"], config)
    facts = corpus.facts | facts | {"passes": passes}
    return LanguageData(train, splits["validation"], splits["test"], facts, fingerprint(name, config.weights))


def _prepare(config: CorpusConfig, corpus: TextCorpus, tokenizer: Any, result: Path, scratch: Path) -> None:
    """Write the splits and their facts to `result`."""
    facts: dict[str, Any] = {"token_lengths": {"edges": EDGES}}
    splits: dict[Role, Dataset] = {}
    for name in ROLES:
        found = _tokens(config, corpus.splits[name], tokenizer, name, scratch)
        sequences = _pack(found, config.max_length, name, scratch)
        facts.setdefault("sequences", {})[name] = len(sequences)
        facts.setdefault("tokens", {})[name] = int(found.lengths.sum())
        facts.setdefault("unknown_tokens", {})[name] = found.unknown / max(1, int(found.lengths.sum()))
        facts.setdefault("cut", {})[name] = float(np.mean(found.lengths > config.max_length))
        facts.setdefault("filled", {})[name] = float(np.mean(sequences["length"]) / config.max_length)
        facts["token_lengths"][name] = length_histogram(found.lengths)
        if name == "train":
            facts["sequences_of_source"] = count_sources(sequences["source"], config.name)
        splits[name] = sequences.remove_columns("source")
    save_splits(result, splits, facts)


@dataclass(frozen=True)
class _Tokens:
    """Framed texts of one split, end to end.

    Attributes:
        flat: token ids, on the disk.
        lengths, bytes, source: of each text.
        unknown: tokens of a character that the tokenizer does not know.
    """

    flat: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]
    unknown: int


def _tokens(config: CorpusConfig, texts: Dataset, tokenizer: Any, name: Role, scratch: Path) -> _Tokens:
    features = Features(
        {
            "input_ids": ListOf(Value("int32")),
            "bytes": Value("int64"),
            "unknown": Value("int32"),
        }
    )
    table = map_texts(
        texts.select_columns("text"),
        functools.partial(_framed, tokenizer=tokenizer),
        features,
        processes=config.tokenize_processes,
        scratch=scratch,
        title=f"Tokenizing {name}",
    )
    lengths = []
    path = scratch / f"{name}.tokens"
    with path.open("wb") as file:
        for batch in table.with_format("arrow").iter(1000):
            for chunk in batch.column("input_ids").chunks:
                file.write(chunk.flatten().to_numpy().tobytes())
                lengths.append(chunk.value_lengths().to_numpy())
    columns = table.select_columns(["bytes", "unknown"]).with_format("numpy")[:]
    return _Tokens(
        np.memmap(path, np.int32, "r"),
        np.concatenate(lengths).astype(np.int64),
        columns["bytes"],
        np.asarray(texts["source"]).astype(np.int64),
        int(columns["unknown"].sum()),
    )


def _framed(texts: list[str], *, tokenizer: Any) -> dict[str, Any]:
    """Each text between the token that begins one and the one that ends it."""
    end = tokenizer.eos_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    found = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    unknown = None if tokenizer.unk_token_id in (begin, end) else tokenizer.unk_token_id
    return {
        "input_ids": [[begin, *ids, end] for ids in found],
        "bytes": [len(text.encode("utf-8", "surrogatepass")) for text in texts],
        "unknown": [0 if unknown is None else ids.count(unknown) for ids in found],
    }


def _pack(found: _Tokens, room: int, name: str, scratch: Path) -> Dataset:
    """The sequences of one split, those of each source together."""
    features = Features(
        {
            "input_ids": ListOf(Value("int32")),
            "pieces": ListOf(Value("int32")),
            "bytes": Value("int64"),
            "length": Value("int32"),
            "id": Value("int64"),
            "source": Value("int32"),
        }
    )
    with quiet(bars=False):
        return Dataset.from_generator(
            functools.partial(_sequences, found, room),
            features=features,
            cache_dir=str(scratch / name),
            fingerprint=name,
        )


def _sequences(found: _Tokens, room: int) -> Iterator[Mapping[str, Any]]:
    pieces = cut(found.lengths, room)
    begins = np.concatenate([[True], pieces.text[1:] != pieces.text[:-1]])
    of_text = np.where(begins, found.bytes[pieces.text], 0)
    number = 0
    for source in np.unique(found.source):
        mine = np.flatnonzero(found.source[pieces.text] == source)
        for members in pack(pieces.length[mine], room):
            chosen = mine[members]
            lengths = pieces.length[chosen]
            tokens = [found.flat[start : start + n] for start, n in zip(pieces.start[chosen], lengths, strict=True)]
            yield {
                "input_ids": np.concatenate(tokens),
                "pieces": lengths,
                "bytes": int(of_text[chosen].sum()),
                "length": int(lengths.sum()),
                "id": number,
                "source": int(source),
            }
            number += 1
