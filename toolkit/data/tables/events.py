"""What users have done as sequences of items: the last of each is the test, the one before it the validation."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf

from toolkit.config import EventsConfig
from toolkit.data.examples import Examples
from toolkit.data.files import ROLES, Part, Role
from toolkit.data.mapping import quiet
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.stored import load_splits, save_splits
from toolkit.data.tables.columns import Coded, Floats, code, guess, parse
from toolkit.data.tables.reading import RawTable, digest_of, find_tables, read_tables
from toolkit.errors import DataError, ModelError

_REVISION = 1
"""To be raised with every change of this module that changes its result: older caches are then not used."""
_NOT_CONTENT = ("name", "workers")
FILE = "items.json"
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Catalogue:
    """The items that there are; their numbers begin with 1, for 0 is padding.

    Attributes:
        items: by number, from 1.
        titles: of each, for people; as `items` where they have none.
        counts: events of each in training.
        exclude_seen: whether a user is to be offered only what is new to them.
    """

    items: tuple[str, ...]
    titles: tuple[str, ...]
    counts: tuple[int, ...]
    exclude_seen: bool

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it beside a model, as plain JSON."""
        content = {"format": 1, **asdict(self)}
        (Path(folder) / FILE).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Catalogue:
        """Of what `asdict` made."""
        lists = {key: tuple(content[key]) for key in ("items", "titles", "counts")}
        return cls(**lists, exclude_seen=bool(content["exclude_seen"]))

    @classmethod
    def from_pretrained(cls, folder: Path) -> Catalogue:
        """Read it from beside a model.

        Raises:
            ModelError: it is not there, or damaged.
        """
        try:
            return cls.from_json(json.loads((folder / FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ModelError(
                f"{folder / FILE} does not say which items there are: {error}", "Copy the model again, or train again."
            ) from error


@dataclass(frozen=True)
class Events(Examples):
    """Sequences of items in three splits.

    Attributes:
        train: columns `items` (list of int; the items that are looked back on, and at the end the one that is foreseen
            last), `target` (int, 0), `seen` (empty list), `length` (int, of `items`), `id` (int).
        validation, test: the same of each user; `target` is the item to be foreseen after `items`, and `seen` all
            that the user had before it.
        catalogue: the items.
    """

    catalogue: Catalogue


def events(config: EventsConfig) -> Events:
    """Read, check, order and cut; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks, as `table`.

    Raises:
        DataError: data that is missing, malformed or unfit, with its file and row.
    """
    part = find_tables(config.name, "--data.name")
    settings = {key: value for key, value in asdict(config).items() if key not in _NOT_CONTENT}
    name = fingerprint("events", _REVISION, digest_of(part), settings)
    splits, facts = prepared(name, load_splits, functools.partial(_prepare, config, part))
    catalogue = Catalogue.from_json(facts.pop("catalogue"))
    facts |= {"sources": [config.name], "passes": [1.0], "languages": {}}
    return Events(splits["train"], splits["validation"], splits["test"], facts, name, catalogue)


def _prepare(config: EventsConfig, part: Part, result: Path, scratch: Path) -> None:
    """Write the splits and their facts to `result`."""
    raw, _ = read_tables([part])
    for key in ("user", "item", "timestamp"):
        raw.require(getattr(config, key), f"--data.{key}")
    users, items = (code(raw.cells.column(name), config.missing_values) for name in (config.user, config.item))
    moments, faults = _moments(raw, config)
    for row in np.flatnonzero((users.codes < 0) | (items.codes < 0)).tolist():
        faults[row] = f"it has no {config.user if users.codes[row] < 0 else config.item}"
    faults = dict(sorted(faults.items()))
    _refuse_many(raw, faults, config)
    fit = np.ones(len(moments), np.bool_)
    fit[list(faults)] = False
    rows, repeated = _without_repeats(np.flatnonzero(fit), users, items, moments)
    rows, rare = _frequent(rows, items.codes, config.min_item_events)
    rows, short = _frequent(rows, users.codes, config.min_events)
    if not len(rows):
        raise DataError(
            f"{config.name} has no user with {config.min_events} events", "Give more, or lower --data.min_events."
        )
    # By user, then time, then the row: what happened at one moment stays in its order.
    rows = rows[np.lexsort((rows, moments[rows], users.codes[rows]))]
    numbers, catalogue = _catalogue(raw, config, items, rows)
    histories = np.split(numbers, np.flatnonzero(np.diff(users.codes[rows])) + 1)
    counts = np.bincount(np.concatenate([history[:-2] for history in histories]), minlength=len(catalogue) + 1)[1:]
    splits: dict[Role, Dataset] = {role: _dataset(list(_samples(histories, role, config.max_length))) for role in ROLES}
    facts: dict[str, Any] = {
        "catalogue": {
            "items": [items.words[index] for index in catalogue],
            "titles": _titles(raw, config, items, rows, catalogue),
            "counts": counts.tolist(),
            "exclude_seen": config.exclude_seen,
        },
        "users": len(histories),
        "items": len(catalogue),
        "untrained_items": int(np.sum(counts == 0)),
        "events": len(rows),
        "samples": {role: len(found) for role, found in splits.items()},
        "dropped": {"unfit": len(faults), "repeated": repeated, "of rare items": rare, "of users with few": short},
        "warnings": _warnings(raw, faults),
    }
    save_splits(result, splits, facts)


def _moments(raw: RawTable, config: EventsConfig) -> tuple[Floats, dict[int, str]]:
    """When each event was, as a number that grows; and the rows that do not say."""
    coded = code(raw.cells.column(config.timestamp), config.missing_values)
    kind, _ = guess(coded.words, coded.counts())
    if kind not in ("numeric", "date"):
        raise DataError(
            f"column '{config.timestamp}' of {raw.begins[0][1]} holds neither numbers nor dates, as "
            f"{', '.join(map(repr, coded.words[:3])) or 'it is empty'}",
            "Name the column that says when with --data.timestamp.",
        )
    moments = np.append(parse(kind, coded.words)[:, -1], np.nan)[coded.codes]
    faults = {}
    for row in np.flatnonzero(np.isnan(moments)).tolist():
        said = coded.words[coded.codes[row]] if coded.codes[row] >= 0 else ""
        faults[row] = f"its {config.timestamp} is {said!r:.40}" if said else f"it has no {config.timestamp}"
    return moments, faults


def _without_repeats(rows: Ids, users: Coded, items: Coded, moments: Floats) -> tuple[Ids, int]:
    """Without an event that stands there twice: the same user, item and moment."""
    keys = np.stack([users.codes[rows], items.codes[rows], moments[rows]], axis=1)
    _, first = np.unique(keys, axis=0, return_index=True)
    return rows[np.sort(first)], len(rows) - len(first)


def _frequent(rows: Ids, codes: npt.NDArray[np.int32], least: int) -> tuple[Ids, int]:
    """Those whose code stands so often among them, and how many are left out."""
    often = np.bincount(codes[rows])[codes[rows]] >= least if len(rows) else np.empty(0, np.bool_)
    return rows[often], int(np.sum(~often))


def _catalogue(raw: RawTable, config: EventsConfig, items: Coded, rows: Ids) -> tuple[Ids, Ids]:
    """The number of the item of each row, from 1; and the index of the words of each item, by number.

    Sorted by their words: the numbers do not depend on the order of the rows.
    """
    there = np.unique(items.codes[rows])
    catalogue = np.array(sorted(there.tolist(), key=lambda index: items.words[index]), np.int64)
    number = np.zeros(len(items.words), np.int64)
    number[catalogue] = np.arange(1, len(catalogue) + 1)
    return number[items.codes[rows]], catalogue


def _titles(raw: RawTable, config: EventsConfig, items: Coded, rows: Ids, catalogue: Ids) -> list[str]:
    """The name of each item for people: where it stands first, or what it is called."""
    if config.title not in raw.cells.column_names:
        if config.title != EventsConfig().title:
            raw.require(config.title, "--data.title")
        return [items.words[index] for index in catalogue]
    titles = code(raw.cells.column(config.title), config.missing_values)
    _, first = np.unique(items.codes[rows], return_index=True)
    row_of = dict(zip(np.unique(items.codes[rows]).tolist(), rows[first].tolist(), strict=True))
    found = [titles.codes[row_of[index]] for index in catalogue.tolist()]
    return [titles.words[at] if at >= 0 else items.words[index] for at, index in zip(found, catalogue, strict=True)]


def _samples(histories: Sequence[Ids], role: Role, longest: int) -> Iterator[tuple[Ids, int, Ids]]:
    """What is looked back on, what is to be foreseen after it, and all that was before."""
    for history in histories:
        if role == "train":
            # The newest pieces are whole; each ends with the item that the next begins with.
            known = history[:-2]
            for end in range(len(known), 1, -longest):
                yield known[max(0, end - longest - 1) : end], 0, known[:0]
        else:
            at = len(history) - (1 if role == "test" else 2)
            yield history[max(0, at - longest) : at], int(history[at]), history[:at]


def _dataset(samples: Sequence[tuple[Ids, int, Ids]]) -> Dataset:
    features = Features(
        {
            "items": ListOf(Value("int32")),
            "target": Value("int32"),
            "seen": ListOf(Value("int32")),
            "length": Value("int32"),
            "id": Value("int64"),
        }
    )
    columns = {
        "items": [items for items, _, _ in samples],
        "target": [target for _, target, _ in samples],
        "seen": [seen for _, _, seen in samples],
        "length": [len(items) for items, _, _ in samples],
        "id": list(range(len(samples))),
    }
    with quiet(bars=False):
        return Dataset.from_dict(columns, features=features)


def _refuse_many(raw: RawTable, faults: Mapping[int, str], config: EventsConfig) -> None:
    if len(faults) > config.max_bad_rows:
        shown = "; ".join(f"{raw.where(row)}: {why}" for row, why in list(faults.items())[:5])
        raise DataError(f"{len(faults):,} rows are unfit: {shown}", "Mend them, or raise --data.max_bad_rows.")


def _warnings(raw: RawTable, faults: Mapping[int, str]) -> list[str]:
    if not faults:
        return []
    row, why = next(iter(faults.items()))
    return [f"{len(faults):,} unfit rows are left out, the first being {raw.where(row)}: {why}"]
