"""Texts as sequences of tokens for a language model: each text framed, cut where it is too long, and packed."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Features, Value, load_from_disk
from datasets import Sequence as ListOf

from toolkit.config import CorpusConfig
from toolkit.data.files import ROLES, Role
from toolkit.data.mapping import map_texts, quiet
from toolkit.data.packing import cut, pack
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.text_corpus import TextCorpus
from toolkit.data.tokenize import EDGES, length_histogram, tokenizer_fingerprint
from toolkit.errors import ConfigError, DataError

_REVISION = 1
"""To be raised with every change of this package that changes its result: older caches are then not used."""
_FACTS = "facts.json"


class Mixture:
    """Rows of a data set, any number of times each, with ids of their own.

    Args:
        dataset: Arrow, with a column `id`.
        rows: numbers of its rows.
    """

    def __init__(self, dataset: Dataset, rows: npt.NDArray[np.int64]) -> None:
        self._dataset = dataset
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def with_format(self, kind: str) -> Mixture:
        """As of a data set; its columns are arrays anyway."""
        return self

    def __getitem__(self, key: str | Sequence[int]) -> Any:
        """A whole column, or some rows as columns."""
        if key == "id":
            return np.arange(len(self))
        if isinstance(key, str):
            return np.asarray(self._dataset[key])[self._rows]
        return self._dataset[self._rows[key].tolist()] | {"id": list(key)}


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
    if config.weights and len(config.weights) != len(config.name):
        raise ConfigError(
            f"--data.weights has {len(config.weights)} numbers for the {len(config.name)} sources of --data.name",
            "Give one for each, or none.",
        )
    if len(config.weights) == 1:
        raise ConfigError("--data.weights has no effect on one source", "Leave it out.")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end token, so that the model could not learn where a text ends",
            "Name an `eos_token` in its tokenizer_config.json, or take another with --tokenizer.name.",
        )
    name = fingerprint("sequences", _REVISION, corpus.fingerprint, tokenizer_fingerprint(tokenizer), config.max_length)
    splits, facts = prepared(name, _load, functools.partial(_prepare, config, corpus, tokenizer))
    facts = corpus.facts | facts | {"passes": [1.0] * len(config.name)}
    train: Dataset | Mixture = splits["train"]
    if config.weights:
        rows, facts["passes"] = _mix(facts["sequences_of_source"], config.weights, config.split_seed)
        train = Mixture(splits["train"], rows)
        name = fingerprint(name, config.weights)
    return LanguageData(train, splits["validation"], splits["test"], facts, name)


def _mix(counts: Sequence[int], weights: Sequence[float], seed: int) -> tuple[npt.NDArray[np.int64], list[float]]:
    """The sequences of an epoch, and how often each source is gone through in it.

    The source that has most for its weight is seen once, the others as often as their weights ask for: in whole
    passes, and one over a random part.
    """
    shares = np.array(weights) / sum(weights)
    total = max(count / share for count, share in zip(counts, shares, strict=True))
    generator = np.random.default_rng(seed)
    rows, start = [], 0
    for count, share in zip(counts, shares, strict=True):
        wanted = max(round(total * share), count)
        whole, rest = divmod(wanted, count)
        rows.append(start + np.tile(np.arange(count), whole))
        rows.append(start + np.sort(generator.permutation(count)[:rest]))
        start += count
    return np.concatenate(rows), [round(total * share) / count for count, share in zip(counts, shares, strict=True)]


def _load(folder: Path) -> tuple[dict[Role, Dataset], dict[str, Any]] | None:
    try:
        facts: dict[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        with quiet(bars=False):
            splits = {name: load_from_disk(str(folder / name)) for name in ROLES}
        whole = all(len(splits[name]) == facts["sequences"][name] for name in ROLES)
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException):
        return None
    return (splits, facts) if whole else None


def _prepare(config: CorpusConfig, corpus: TextCorpus, tokenizer: Any, result: Path, scratch: Path) -> None:
    """Write the splits and their facts to `result`."""
    facts: dict[str, Any] = {"token_lengths": {"edges": EDGES}}
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
            of_source = np.bincount(sequences["source"], minlength=len(config.name))
            facts["sequences_of_source"] = of_source.tolist()
            if not of_source.all():
                missing = config.name[int(np.argmin(of_source))]
                raise DataError(f"--data.name {missing} has no training texts left", "Leave it out, or mend it.")
        with quiet(bars=False):
            sequences.remove_columns("source").save_to_disk(str(result / name))
    (result / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


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
