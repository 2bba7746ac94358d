"""Texts, or pairs of them, with what is to be said of each: a class, several labels, or a number.

One text and one class go the way of `text_classification`; all else are rows of any kind.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from toolkit.config import SourcesConfig, TextDataConfig
from toolkit.data.clean import check_labels, sort_labels
from toolkit.data.examples import examples
from toolkit.data.files import ROLES, Role
from toolkit.data.hub import hub_splits
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.rows import Unfit, gather_rows, write
from toolkit.data.sources import resolve
from toolkit.data.text_classification import TextClassification, text_classification
from toolkit.data.text_corpus import Place, TextCorpus
from toolkit.data.tokenize import check_tokenizer, encode, encode_pairs, tokenizer_fingerprint
from toolkit.errors import ConfigError, DataError

_REVISION = 1
"""To be raised with every change of this module that changes its result: older caches are then not used."""
_WHAT = ("texts with what is to be said of them", "name their columns with --data.text and --data.label")
_NAMES = "names.json"
_BINS = 8
_UNUSUAL = (0.05, 20.0)
"""Spreads of numbers outside of these are learnt slowly, from outputs that begin near 0."""


def labelled_texts(config: TextDataConfig, tokenizer: Any) -> TextClassification:
    """Read, check, split, limit and tokenise; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks.

    Returns:
        As `text_classification`. Pairs have a column `token_type_ids` too, where the model reads that. Of several
        labels, `label` is a list of as many 0 and 1 as there are; of numbers, the number, and `labels` the name of
        their column.

    Raises:
        ConfigError: a setting that cannot take effect or is out of range.
        DataError: data that is missing, malformed or unfit.
    """
    if config.separator is not None and config.target != "labels":
        raise ConfigError(
            f"--data.separator has no effect with --data.target {config.target}",
            "Drop it, or use --data.target labels.",
        )
    if config.text_pair is not None and config.text_pair in (config.text, config.label):
        raise ConfigError(
            f"--data.text_pair names the column '{config.text_pair}' as another setting does", "Name the second text's."
        )
    if config.text_pair is None and config.target == "class":
        return text_classification(config, tokenizer)
    warnings = check_tokenizer(tokenizer, config.max_length)
    sources, corpus = _gather(config)
    names = _names(config, corpus)
    encode_one = functools.partial(
        _encode, target=config.target, names=names, tokenizer=tokenizer, length=config.max_length
    )
    settings = ["targets", _REVISION, tokenizer_fingerprint(tokenizer), config.max_length, config.target, list(names)]
    found = examples(sources, corpus, encode_one, _features(config, tokenizer), settings)
    assert isinstance(found.train, Dataset)
    splits: dict[Role, Dataset] = {
        "train": found.train,
        "validation": _some(found.validation, config.validation_samples, config.split_seed),
        "test": _some(found.test, config.test_samples, config.split_seed),
    }
    targets = {role: np.asarray(rows["label"]) for role, rows in splits.items()}
    facts = {
        "source": config.name,
        **{f"{why.replace(' ', '_')}_dropped": count for why, count in found.facts["dropped"].items()},
        **_about(config, names, targets),
        "truncated": found.facts["cut"],
        "token_lengths": found.facts["token_lengths"],
        "stages": found.facts["stages"],
    }
    facts["warnings"] = [*warnings, *found.facts["warnings"], *facts["warnings"]]
    name = fingerprint(found.fingerprint, config.validation_samples, config.test_samples)
    return TextClassification(**splits, labels=names, facts=facts, fingerprint=name)


def _gather(config: TextDataConfig) -> tuple[SourcesConfig, TextCorpus]:
    source = resolve(config)
    places: dict[Role, Sequence[Place]] = {role: [part] for role, part in source.parts.items()}
    if source.hub:
        places = {role: [source.hub] for role in hub_splits(source.hub)} | places
    sources = SourcesConfig(
        name=(config.name,),
        validation_share=config.validation_share,
        test_share=config.test_share,
        train_texts=config.train_samples,
        split_seed=config.split_seed,
        folds=config.folds,
        fold=config.fold,
        group=config.group,
        normalise=config.normalise,
        deduplicate=config.deduplicate,
        tokenize_processes=config.tokenize_processes,
        max_bad_rows=config.max_bad_rows,
    )
    columns = {key: getattr(config, key) for key in ("text", "text_pair", "label", "target", "separator")}
    canonical = functools.partial(_canonical, **columns)
    settings = {"kind": "targets", "revision": _REVISION, **columns}
    places = {role: places.get(role, ()) for role in ROLES}
    return sources, gather_rows(sources, canonical, _WHAT, settings, _said, places=places)


def _canonical(
    row: Mapping[str, Any], text: str, text_pair: str | None, label: str, target: str, separator: str | None
) -> str:
    for column in filter(None, (text, text_pair, label)):
        if column not in row:
            raise Unfit(f"they have no column '{column}' but {', '.join(map(str, row))}")
    texts = [row[column] for column in (text, text_pair) if column]
    if not all(isinstance(one, str) and one.strip() for one in texts):
        raise Unfit("they have no text")
    return write({"texts": texts, "label": _TARGETS[target](row[label], separator)})


def _class(value: Any, separator: str | None) -> str:
    if isinstance(value, list | dict):
        raise Unfit("their label is a list: learn several labels of a text with --data.target labels")
    word = "" if value is None else str(value).strip()
    if not word:
        raise Unfit("they have no label")
    return word


def _labels(value: Any, separator: str | None) -> list[str]:
    """A text may have none."""
    found = (value or "").split(separator or ",") if isinstance(value, str) or value is None else value
    if not isinstance(found, list) or not all(isinstance(one, str | int) for one in found):
        raise Unfit("their labels are neither a list nor words with a separator between")
    return sorted({str(one).strip() for one in found} - {""})


def _number(value: Any, separator: str | None) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise Unfit(f"their label {value!r:.40} is no number") from None
    if not math.isfinite(number):
        raise Unfit(f"their label is {number}")
    return number


_TARGETS = {"class": _class, "labels": _labels, "number": _number}


def _said(text: str) -> str:
    return "\n".join(json.loads(text)["texts"])


def _names(config: TextDataConfig, corpus: TextCorpus) -> tuple[str, ...]:
    """The labels of the training split; of numbers the name of their column.

    Raises:
        DataError: they are no classes, or another split has others.
    """
    if config.target == "number":
        return (config.label,)
    find = functools.partial(_find_names, corpus, config.target)
    names: dict[str, list[str]] = prepared(
        fingerprint("names", _REVISION, corpus.fingerprint, config.target), _load_names, find
    )
    known = sort_labels(set(names["train"]))
    if config.target == "class":
        index = {name: code for code, name in enumerate(known)}
        check_labels(np.array([index[name] for name in names["train"]], np.int32), known, config.label)
    if len(known) < (2 if config.target == "class" else 1):
        raise DataError(
            f"the training data has {len(known)} labels in column '{config.label}'", "Name another with --data.label."
        )
    for role in ROLES[1:]:
        if strange := sorted({*names[role]} - {*known}):
            raise DataError(
                f"the {role} split has rows of class {', '.join(map(repr, strange[:5]))}, of which the training data "
                "has none",
                "Correct the spelling of the labels, remove these rows, or add training rows of that class.",
            )
    return tuple(known)


def _find_names(corpus: TextCorpus, target: str, result: Path, scratch: Path) -> None:
    """Of each row of a class, of others each once."""
    names = {}
    for role, rows in corpus.splits.items():
        labels = [json.loads(text)["label"] for text in rows["text"]]
        names[role] = labels if target == "class" else sorted({name for some in labels for name in some})
    (result / _NAMES).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")


def _load_names(folder: Path) -> dict[str, list[str]] | None:
    try:
        return json.loads((folder / _NAMES).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return None


def _features(config: TextDataConfig, tokenizer: Any) -> Features:
    label = {"class": Value("int64"), "labels": ListOf(Value("int8")), "number": Value("float64")}[config.target]
    pair = config.text_pair is not None and "token_type_ids" in tokenizer.model_input_names
    segments = {"token_type_ids": ListOf(Value("int8"))} if pair else {}
    ids = {"input_ids": ListOf(Value("int32")), **segments}
    return Features({**ids, "label": label, "length": Value("int32"), "cut": Value("bool")})


def _encode(
    row: Mapping[str, Any], *, target: str, names: Sequence[str], tokenizer: Any, length: int
) -> list[dict[str, Any]]:
    texts, label = row["texts"], row["label"]
    found = encode(texts, tokenizer, length) if len(texts) == 1 else encode_pairs([texts], tokenizer, length)
    if target == "class":
        label = names.index(label)
    elif target == "labels":
        label = [int(name in label) for name in names]
    columns = {name: found[name][0] for name in ("input_ids", "token_type_ids") if name in found}
    cut = bool(found.encodings and found.encodings[0].overflowing)
    if not columns["input_ids"]:
        raise Unfit("the tokenizer finds no token in them")
    return [{**columns, "label": label, "length": len(columns["input_ids"]), "cut": cut}]


def _some(rows: Dataset, most: int | None, seed: int) -> Dataset:
    """At most so many of them, always the same."""
    if most is None or len(rows) <= most:
        return rows
    return rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:most]))


def _about(config: TextDataConfig, names: Sequence[str], targets: Mapping[Role, npt.NDArray[Any]]) -> dict[str, Any]:
    """How often each label is there (of numbers, each stretch), and what an answer that is always the same reaches."""
    if config.target == "class":
        counts = {role: np.bincount(codes, minlength=len(names)) for role, codes in targets.items()}
        return {"samples": {role: _counted(names, found) for role, found in counts.items()}, "warnings": []}
    if config.target == "labels":
        sums = {role: hot.sum(0) for role, hot in targets.items()}
        often = int(sums["train"].argmax())
        f1 = 2 * sums["test"][often] / (len(targets["test"]) + sums["test"].sum())
        return {
            "samples": {role: _counted(names, found) for role, found in sums.items()},
            "about": f"{len(names)}, of which a text may have any number; '{names[often]}' for all: micro F1 {f1:.4f}",
            "constant": {"micro_f1": float(f1)},
            "warnings": [],
        }
    mean, spread = float(targets["train"].mean()), float(targets["train"].std())
    off = targets["test"] - mean
    mae, rmse = float(np.abs(off).mean()), float(np.sqrt((off**2).mean()))
    edges = np.histogram_bin_edges(np.concatenate(list(targets.values())), _BINS)
    bins = [f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges)]
    hint = f"the numbers spread by {spread:.3g} around {mean:.3g}, which is learnt slowly: bring them to about −3 to 3"
    return {
        "samples": {role: _counted(bins, np.histogram(found, edges)[0]) for role, found in targets.items()},
        "about": f"numbers; the training mean {mean:.3g} for all misses by {mae:.4f} in the mean, RMSE {rmse:.4f}",
        "constant": {"mae": mae, "rmse": rmse},
        "warnings": [] if _UNUSUAL[0] < spread < _UNUSUAL[1] and abs(mean) < _UNUSUAL[1] else [hint],
    }


def _counted(names: Sequence[str], counts: npt.NDArray[Any]) -> dict[str, int]:
    return dict(zip(names, counts.tolist(), strict=True))
