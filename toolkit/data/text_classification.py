"""Labelled texts, from wherever they lie to token ids in three splits, once for all ranks of a machine."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, load_from_disk

from toolkit.config import TextDataConfig
from toolkit.data.clean import Cleaned, clean
from toolkit.data.files import ROLES, Role
from toolkit.data.mapping import ROWS_FOR_A_BAR, normalised_texts, quiet
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.sources import Corpus, Source, digest, read, resolve
from toolkit.data.split import Split, check_shares, keys_of_groups, split
from toolkit.data.stages import Stages
from toolkit.data.tokenize import EDGES, check_tokenizer, length_histogram, tokenize, tokenizer_fingerprint
from toolkit.errors import DataError
from toolkit.normalise import check_normalisation

_REVISION = 2
"""To be raised with every change of this package that changes its result: older caches are then not used."""
_FACTS = "facts.json"
_NOT_CONTENT = (
    *("name", "revision", "validation", "test", "workers", "tokenize_processes", "max_bad_rows"),
    *("text_pair", "target", "separator"),  # which are not read here
)
_MANY_UNKNOWN = 0.1


@dataclass(frozen=True)
class TextClassification:
    """Tokenised texts with their classes.

    Attributes:
        train: columns `input_ids` (list of int, special tokens included, not padded), `label` (int, index into
            `labels`), `length` (int, tokens in `input_ids`), `id` (int, row number in the source, from 0, running on
            from its training rows to its validation and then its test rows).
        validation: the same.
        test: the same.
        labels: names of the classes, sorted; as numbers if all of them are integers.
        facts: what was read, dropped, counted and is to be warned of; fit for JSON.
        fingerprint: of content, settings and tokenizer; the same on every machine.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    labels: tuple[str, ...]
    facts: dict[str, Any]
    fingerprint: str


def text_classification(config: TextDataConfig, tokenizer: Any) -> TextClassification:
    """Read, check, clean, split, limit and tokenise; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks: of those that share a cache, one does the work and the
    others wait for it, for as long as it takes.

    Args:
        config: which data, and how.
        tokenizer: of transformers.

    Raises:
        ConfigError: a setting that cannot take effect or is out of range.
        DataError: data that is missing, malformed or unfit.
    """
    check_normalisation(config.normalise)
    source = resolve(config)
    if source.hub is None:
        check_shares(config, source.parts)  # before anything is read
    warnings = [*source.warnings, *check_tokenizer(tokenizer, config.max_length)]
    name = fingerprint(*_content(config, source, tokenizer))
    splits, stored = prepared(name, _load, functools.partial(_prepare, config, source, tokenizer))
    # These depend on the names of files, and the same content may lie under other names.
    facts = {"source": config.name, **stored["facts"], "warnings": warnings + stored["facts"]["warnings"]}
    return TextClassification(**splits, labels=tuple(stored["labels"]), facts=facts, fingerprint=name)


def _content(config: TextDataConfig, source: Source, tokenizer: Any) -> list[Any]:
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_CONTENT}
    return [_REVISION, digest(source), settings, tokenizer_fingerprint(tokenizer)]


def _load(folder: Path) -> tuple[dict[Role, Dataset], dict[str, Any]] | None:
    """The splits and what is told about them; None where they are not, or not whole."""
    try:
        stored: dict[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        with quiet(bars=False):
            splits = {name: load_from_disk(str(folder / name)) for name in ROLES}
        whole = all(len(splits[name]) == sum(stored["facts"]["samples"][name].values()) for name in ROLES)
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException):
        return None
    return (splits, stored) if whole else None


def cleaned_and_split(
    config: TextDataConfig, source: Source, scratch: Path
) -> tuple[Corpus, Cleaned, Split, list[dict[str, Any]]]:
    """Labelled texts as they are before they are cut into tokens: all rows, what was made of them, and the stages."""
    corpus = read(source, config.text, config.label, scratch, config.group)
    texts = normalised_texts(corpus.texts, config.normalise, processes=config.tokenize_processes, scratch=scratch)
    corpus = dataclasses.replace(corpus, texts=texts)
    stages = Stages(corpus.texts)
    cleaned = clean(corpus, config, scratch, stages.note)
    units = None if corpus.groups is None else keys_of_groups(corpus.groups, cleaned.keys)
    chosen = split(config, cleaned, [ROLES[role] for role in np.unique(corpus.roles)], units)
    stages.note("beyond the wished number, or in another split", chosen.roles)
    return corpus, cleaned, chosen, stages.facts


def _prepare(config: TextDataConfig, source: Source, tokenizer: Any, result: Path, scratch: Path) -> None:
    """Write the splits and their facts to `result`."""
    corpus, cleaned, chosen, stages = cleaned_and_split(config, source, scratch)
    given = [ROLES[role] for role in np.unique(corpus.roles)]
    facts: dict[str, Any] = {
        "rows_read": {name: int(np.sum(corpus.roles == role)) for role, name in enumerate(ROLES) if name in given},
        **cleaned.dropped,
        "repeats_after_split_dropped": chosen.repeats,
        "samples": {},
        "truncated": {},
        "unknown_tokens": {},
        "token_lengths": {"edges": EDGES},
        "warnings": [*cleaned.warnings, *chosen.warnings],
        "stages": stages,
    }
    for role, name in enumerate(ROLES):
        rows = np.flatnonzero(chosen.roles == role)
        tokens = tokenize(
            corpus.texts.select(rows),
            tokenizer,
            config.max_length,
            processes=config.tokenize_processes,
            scratch=scratch,
            title=f"Tokenizing {name}",
        )
        codes = cleaned.codes[rows].astype(np.int64)
        counts = np.bincount(codes, minlength=len(cleaned.labels))
        facts["samples"][name] = dict(zip(cleaned.labels, counts.tolist(), strict=True))
        _measure(tokens, name, tokenizer, facts)
        _write(tokens, codes, rows, result / name)
    stored = {"labels": cleaned.labels, "facts": facts}
    (result / _FACTS).write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")


def _measure(tokens: Dataset, name: str, tokenizer: Any, facts: dict[str, Any]) -> None:
    """Add to `facts` what the tokenizer did to one split."""
    columns = tokens.select_columns(["length", "whole", "unknown"]).with_format("numpy")[:]
    length, whole, unknown = columns["length"], columns["whole"], columns["unknown"]
    if empty := int(np.sum(length == 0)):
        raise DataError(
            f"{empty} texts of the {name} split give no token at all with this tokenizer",
            "Remove texts of nothing but control characters, or use a tokenizer that adds special tokens.",
        )
    share = float(unknown.sum() / length.sum())
    facts["truncated"][name] = float(np.mean(whole > length))
    facts["unknown_tokens"][name] = share
    facts["token_lengths"][name] = length_histogram(whole)
    if empty := int(np.sum(whole <= tokenizer.num_special_tokens_to_add(pair=False))):
        facts["warnings"].append(f"{empty} texts of the {name} split have no token but special ones")
    if share > _MANY_UNKNOWN and name == "train":
        facts["warnings"].append(
            f"{share:.0%} of the tokens are unknown to the tokenizer: is it made for this language?"
        )


def _write(tokens: Dataset, codes: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], folder: Path) -> None:
    table = tokens.select_columns(["input_ids", "length"]).add_column("label", codes).add_column("id", rows)
    with quiet(bars=len(rows) >= ROWS_FOR_A_BAR):
        table.select_columns(["input_ids", "label", "length", "id"]).save_to_disk(str(folder))
