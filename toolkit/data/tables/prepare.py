"""A table in three splits as a network reads it, once for all ranks of a machine."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from toolkit.config import TableConfig
from toolkit.data.clean import DROPPED, TRAIN, Roles, Rows
from toolkit.data.examples import Examples
from toolkit.data.files import ROLES, Part, Role
from toolkit.data.mapping import quiet
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.stored import load_splits, save_splits
from toolkit.data.tables.columns import Coded, code, guess, parse
from toolkit.data.tables.faults import refuse_many, stages_of, warnings_of
from toolkit.data.tables.parting import check_parting, part_table
from toolkit.data.tables.preprocess import Encoded, Preprocessor, fit
from toolkit.data.tables.reading import RawTable, digest_of, find_tables, read_tables
from toolkit.data.tables.target import TargetScale, fit_scale
from toolkit.errors import DataError

_REVISION = 3
"""To be raised with every change of this package that changes its result: older caches are then not used."""
_NOT_CONTENT = ("name", "validation", "test", "workers")
_FEW_CLASSES = 20
_MEND = (
    "Mend them, name the words that stand for nothing with --data.missing_values, give their column another kind "
    "(--data.categorical, --data.drop), or raise --data.max_bad_rows."
)


@dataclass(frozen=True)
class TableData(Examples):
    """Rows of a table in three splits.

    Attributes:
        train, validation, test: columns `numbers` (list of float), `categories` (list of int), `target` (float in its
            own units, or the index of a class), `length` (how many of both), `id` (row number in the source).
        preprocessor: reads new rows in the same way.
    """

    preprocessor: Preprocessor


def table(config: TableConfig) -> TableData:
    """Read, check, split, and encode by what the training rows say; the second call with the same content loads it.

    To be called before the process group exists, on all ranks, as `text_classification`.

    Raises:
        ConfigError: a setting that cannot take effect, is out of range, or names a column that is not there.
        DataError: data that is missing, malformed or unfit, with its file and row.
    """
    names = {"train": config.name, "validation": config.validation, "test": config.test}
    found: dict[Role, Part] = {
        role: find_tables(names[role] or "", "--data.name" if role == "train" else f"--data.{role}")
        for role in ROLES
        if names[role]
    }
    check_parting(config, found.keys())
    settings = {key: value for key, value in asdict(config).items() if key not in _NOT_CONTENT}
    content = {role: digest_of(part) for role, part in found.items()}
    name = fingerprint("table", _REVISION, content, settings)
    splits, facts = prepared(name, load_splits, functools.partial(_prepare, config, found))
    facts |= {"sources": [config.name], "passes": [1.0], "languages": {}}
    return TableData(
        splits["train"], splits["validation"], splits["test"], facts, name, Preprocessor.from_json(facts["reading"])
    )


@dataclass(frozen=True)
class _Target:
    """What is to be predicted of each row: a number, or the index of a word in `words`; NaN or -1 where there is none.

    Attributes:
        values: of all rows.
        words: classes; none for a measurement.
        faults: why a row has none, by its index.
    """

    values: npt.NDArray[Any]
    words: tuple[str, ...]
    faults: dict[int, str]


def _prepare(config: TableConfig, places: Mapping[Role, Part], result: Path, scratch: Path) -> None:
    """Write the splits and their facts to `result`."""
    raw, sizes = read_tables(list(places.values()))
    raw.require(config.target, "--data.target")
    if config.group:
        raw.require(config.group, "--data.group")
    roles = np.repeat(np.array([ROLES.index(role) for role in places], np.int8), sizes)
    target = _target(raw, config)
    refuse_many(raw, target.faults, config.max_bad_rows, _MEND)
    roles[list(target.faults)] = DROPPED
    classes = target.values if target.words and config.split != "random" else None
    if config.split == "stratified" and not target.words:
        classes = _tenths(target.values, roles)
    roles, leaks = part_table(config, roles, raw.cells, classes)
    train = _not_empty(roles)
    labels, scale = _learnt(raw, config, target, roles, train)
    aside = {config.target, config.group}
    columns = {name: code(raw.cells.column(name), config.missing_values) for name in raw.cells.column_names}
    of_training = {name: Coded(c.words, c.codes[train]) for name, c in columns.items() if name not in aside}
    reading, facts = fit(of_training, config, labels, scale)
    if not reading.kinds:
        raise DataError(f"{config.name} has no column to learn from", "Give columns beside the target.")
    encoded = reading.encode({name: raw.cells.column(name) for name in reading.kinds})
    faults = {row: why for row, why in encoded.faults.items() if roles[row] != DROPPED}
    refuse_many(raw, target.faults | faults, config.max_bad_rows, _MEND)
    faults = dict(sorted((target.faults | faults).items()))
    roles, more = _left_out(config, roles, encoded, faults)
    dropped = {"unfit": len(faults), "in a held-out split": leaks, **more}
    _not_empty(roles)
    splits = {role: _rows(encoded, target, labels, np.flatnonzero(roles == n)) for n, role in enumerate(ROLES)}
    facts |= {
        "reading": reading.to_json(),
        "read": {role: int(size) for role, size in zip(places, sizes, strict=True)},
        "samples": {role: len(rows) for role, rows in splits.items()},
        "training_rows": len(train),
        "dropped": dropped,
        "stages": stages_of(raw, faults, dropped),
        "warnings": warnings_of(raw, faults),
        "counts": _counts(splits, labels),
    }
    facts["warnings"] += [
        f"class '{name}' has no rows in the {role} split"
        for role, counts in facts["counts"].items()
        for name, count in counts.items()
        if not count
    ]
    save_splits(result, splits, facts)


def _target(raw: RawTable, config: TableConfig) -> _Target:
    """Read the column that is to be predicted, as what it is or is asked to be."""
    coded = code(raw.cells.column(config.target), config.missing_values)
    counts = coded.counts()
    kind, _ = guess(coded.words, counts)
    numbers = parse("numeric", coded.words)[:, 0] if coded.words else np.empty(0)
    few_numbers = len(coded.words) <= _FEW_CLASSES and bool(np.all(numbers == np.round(numbers)))
    task = config.task
    if task == "auto":
        task = "regression" if kind == "numeric" and not few_numbers else "classification"
    faults = dict.fromkeys(np.flatnonzero(coded.codes < 0).tolist(), f"it has no {config.target}")
    if task == "classification":
        return _Target(coded.codes.astype(np.int64), coded.words, faults)
    values = np.append(numbers, np.nan)[coded.codes]
    for row in np.flatnonzero(np.isnan(values) & (coded.codes >= 0)).tolist():
        faults[row] = f"its {config.target} is {coded.words[coded.codes[row]]!r:.40}, not a number"
    return _Target(values, (), dict(sorted(faults.items())))


def _learnt(
    raw: RawTable, config: TableConfig, target: _Target, roles: Roles, train: Rows
) -> tuple[tuple[str, ...], TargetScale | None]:
    """The classes of the training rows, or the scale of their measurements."""
    if not target.words:
        try:
            return (), fit_scale(target.values[train], config.target_transform)
        except ValueError as error:
            raise DataError(f"--data.target {config.target} of {raw.begins[0][1]}: {error}", _OTHER_TARGET) from error
    if len(target.words) < 2:
        raise DataError(f"'{config.target}' of {raw.begins[0][1]} has fewer than two classes", "Name another target.")
    if config.target_transform == "log1p":
        raise DataError(f"--data.target_transform log1p has no effect on the classes of {config.target}", "Drop it.")
    words = {target.words[index] for index in np.unique(target.values[train])}
    for row in np.flatnonzero(roles != DROPPED):
        if (name := target.words[target.values[row]]) not in words:
            raise DataError(
                f"class '{name}' of {config.target} is in the {ROLES[roles[row]]} split but not in training, as "
                f"{raw.where(int(row))}",
                "Add rows of that class, leave them out, or use fewer folds or another --data.split_seed.",
            )
    return tuple(sorted(words, key=_by_number)), None


_OTHER_TARGET = "Name another target, or use --data.target_transform none."


def _by_number(word: str) -> tuple[float, str]:
    value = parse("numeric", [word])[0, 0]
    return (np.inf if np.isnan(value) else value, word)


def _tenths(values: npt.NDArray[np.float64], roles: Roles) -> Rows:
    """Which tenth of the training targets each lies in."""
    edges = np.quantile(values[roles == TRAIN], np.linspace(0, 1, 11)[1:-1])
    return np.searchsorted(edges, values).astype(np.int64)


def _not_empty(roles: Roles) -> Rows:
    """The training rows. Raises DataError where a split has none."""
    for number, role in enumerate(ROLES):
        if not np.any(roles == number):
            raise DataError(f"the {role} split has no rows left", "Give more rows, or hold out a larger share.")
    return np.flatnonzero(roles == TRAIN)


def _left_out(
    config: TableConfig, roles: Roles, encoded: Encoded, faults: Mapping[int, str]
) -> tuple[Roles, dict[str, int]]:
    """Rows that cannot be read, or are not wanted, are dropped; how many for which reason."""
    roles = roles.copy()
    roles[list(faults)] = DROPPED
    dropped = {}
    for name, asked, which in (
        ("with an empty cell", config.missing, encoded.missing),
        # What is tested on stays as it is, or the test would be made easier.
        ("with an outlier", config.outliers, encoded.outlier & (roles == TRAIN)),
    ):
        if asked == "drop":
            dropped[name] = int(np.sum(which & (roles != DROPPED)))
            roles[which] = DROPPED
    return roles, dropped


def _rows(encoded: Encoded, target: _Target, labels: Sequence[str], rows: Rows) -> Dataset:
    """One split; classes by their index in `labels`."""
    numbers, categories = encoded.numbers[rows], encoded.categories[rows]
    values = target.values[rows]
    if target.words:
        index = {label: number for number, label in enumerate(labels)}
        values = np.array([index.get(word, -1) for word in target.words], np.int64)[values]
    features = Features(
        {
            "numbers": ListOf(Value("float32")),
            "categories": ListOf(Value("int32")),
            "target": Value("int64" if target.words else "float64"),
            "length": Value("int32"),
            "id": Value("int64"),
        }
    )
    columns = {
        "numbers": list(numbers),
        "categories": list(categories),
        "target": values,
        "length": np.full(len(rows), max(1, numbers.shape[1] + categories.shape[1]), np.int32),
        "id": rows,
    }
    with quiet(bars=False):
        return Dataset.from_dict(columns, features=features)


def _counts(splits: Mapping[Role, Dataset], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Rows of each class in each split; nothing for a measurement."""
    if not labels:
        return {}
    return {
        role: dict(zip(labels, np.bincount(rows["target"], minlength=len(labels)).tolist(), strict=True))
        for role, rows in splits.items()
    }
