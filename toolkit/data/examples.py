"""Rows as what a model reads: encoded once for all ranks of a machine, cached by content."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value, concatenate_datasets

from toolkit.config import SourcesConfig
from toolkit.data.files import ROLES, Role
from toolkit.data.mapping import map_texts, quiet
from toolkit.data.mixture import Mixture, check_weights, count_sources, mixed
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.rows import Unfit
from toolkit.data.stored import load_splits, save_splits
from toolkit.data.text_corpus import TextCorpus
from toolkit.data.tokenize import EDGES, length_histogram
from toolkit.errors import DataError

_REVISION = 2
"""To be raised with every change of this module that changes its result: older caches are then not used."""
Row = Mapping[str, Any]
EncodeOne = Callable[[Any], Sequence[Row]]
"""Makes rows of one text, or of what is in it; a row may have a `fault` for which it is left out."""


@dataclass(frozen=True)
class Examples:
    """Encoded rows in three splits.

    Attributes:
        train: the columns of `features`, and `id` (int).
        validation: the same.
        test: the same.
        facts: what was read, dropped, cut and is to be warned of; fit for JSON.
        fingerprint: of content and settings; the same on every machine.
    """

    train: Dataset | Mixture
    validation: Dataset
    test: Dataset
    facts: dict[str, Any]
    fingerprint: str


def examples(
    config: SourcesConfig,
    corpus: TextCorpus,
    encode_one: EncodeOne,
    features: Features,
    settings: Sequence[Any],
    *,
    rows_at_once: int = 1000,
) -> Examples:
    """Encode all rows of a corpus; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks, as `gather_rows`.

    Args:
        config: how sources are mixed, and how many rows may be unfit.
        corpus: canonical texts of `gather_rows`.
        encode_one: makes rows of what a canonical text says (the JSON, parsed); picklable. Raises `Unfit`.
        features: of a row; `length` (tokens, or what else the work grows with) is among them. Where `cut` (bool) is,
            it tells that a sample lost its end.
        settings: what `encode_one` goes by, fit for JSON: a tokenizer by its fingerprint, lengths, a revision.
        rows_at_once: whose samples are in memory together while they are encoded.

    Raises:
        ConfigError: weights that are not one for each source.
        DataError: too many rows are unfit, or a split has none left.
    """
    check_weights(config)
    name = fingerprint("examples", _REVISION, corpus.fingerprint, *settings)
    prepare = functools.partial(_prepare, config, corpus, encode_one, features, rows_at_once)
    splits, facts = prepared(name, load_splits, prepare)
    train, passes = mixed(splits["train"], facts["samples_of_source"], config)
    told = {
        "passes": passes,
        "dropped": corpus.facts["dropped"] | facts["left_out"],
        "warnings": corpus.facts["warnings"] + facts["warnings"],
    }
    return Examples(
        train,
        splits["validation"],
        splits["test"],
        corpus.facts | facts | told,
        fingerprint(name, config.weights),
    )


def encode_rows(
    config: SourcesConfig,
    texts: Dataset,
    encode_one: EncodeOne,
    features: Features,
    *,
    scratch: Path,
    title: str,
    rows_at_once: int = 1000,
) -> Dataset:
    """All rows of a split, those of each source together, with `source` (int) and `fault` (string or null) beside.

    Args:
        config: with how many processes.
        texts: columns `text` and `source`.
        encode_one: gets the text.
        features: of its rows.
        scratch: folder for the result; `title` must be new in it.
        title: shown beside the progress bar.
        rows_at_once: whose samples are in memory together.
    """
    sources = np.asarray(texts["source"])
    columns = Features({**features, "source": Value("int32"), "fault": Value("string")})
    tables = [
        map_texts(
            texts.select(np.flatnonzero(sources == source)).select_columns("text"),
            functools.partial(_encode_some, encode_one=encode_one, columns=tuple(columns), source=int(source)),
            columns,
            processes=config.tokenize_processes,
            scratch=scratch,
            title=f"{title} {source + 1}",
            rows_at_once=rows_at_once,
        )
        for source in np.unique(sources)
    ]
    return concatenate_datasets(tables)


def fit_rows(rows: Dataset, faults: Counter[str]) -> Dataset:
    """Those without a fault; the faults of the others are counted."""
    found = rows.select_columns(["fault"]).with_format("arrow")[:].column("fault")
    faults.update(found.drop_null().to_pylist())
    return rows.select(np.flatnonzero(found.is_null().to_numpy()))


def _encode_some(
    texts: list[str], *, encode_one: EncodeOne, columns: tuple[str, ...], source: int
) -> dict[str, list[Any]]:
    rows: list[Row] = []
    for text in texts:
        try:
            rows += encode_one(text)
        except Unfit as reason:
            rows.append({"fault": str(reason)})
    return {name: [source if name == "source" else row.get(name) for row in rows] for name in columns}


def _encode_json(text: str, encode_one: EncodeOne) -> Sequence[Row]:
    return encode_one(json.loads(text))


def _prepare(
    config: SourcesConfig,
    corpus: TextCorpus,
    encode_one: EncodeOne,
    features: Features,
    rows_at_once: int,
    result: Path,
    scratch: Path,
) -> None:
    """Write the splits and their facts to `result`."""
    facts: dict[str, Any] = {"samples": {}, "cut": {}, "token_lengths": {"edges": EDGES}, "longest": 0}
    splits: dict[Role, Dataset] = {}
    faults: Counter[str] = Counter()
    encode = functools.partial(_encode_json, encode_one=encode_one)
    for name in ROLES:
        options: dict[str, Any] = {"title": f"Encoding {name}", "rows_at_once": rows_at_once}
        rows = encode_rows(config, corpus.splits[name], encode, features, scratch=scratch, **options)
        kept = fit_rows(rows, faults)
        if faults.total() > config.max_bad_rows or not len(kept):
            reasons = "; ".join(f"{count:,} because {reason}" for reason, count in faults.most_common(5))
            raise DataError(
                f"{faults.total():,} rows are unfit, and the {name} split has {len(kept):,} left: {reasons}",
                "Mend them, or raise --data.max_bad_rows.",
            )
        facts["samples"][name] = len(kept)
        facts["token_lengths"][name] = length_histogram(np.asarray(kept["length"]))
        facts["longest"] = max(facts["longest"], int(np.max(kept["length"])))
        facts["cut"][name] = float(np.mean(kept["cut"])) if "cut" in features else 0.0
        if name == "train":
            facts["samples_of_source"] = count_sources(kept["source"], config.name)
        with quiet(bars=False):
            splits[name] = kept.select_columns(list(features)).add_column("id", np.arange(len(kept)))
    facts["left_out"] = {"unfit": faults.total()}
    facts["warnings"] = [f"{count:,} rows are left out because {why}" for why, count in faults.most_common(5)]
    save_splits(result, splits, facts)
