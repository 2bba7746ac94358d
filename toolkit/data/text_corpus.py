"""Plain texts, from wherever they lie to three splits without repeats, once for all ranks of a machine."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from toolkit import samples
from toolkit.config import CorpusConfig, SourcesConfig
from toolkit.data.clean import DROPPED, TEST, TRAIN, VALIDATION, drop_leaks, drop_repeats, group_texts, key_texts
from toolkit.data.files import ROLES, Part, Role, read_part
from toolkit.data.hub import HubData, find, read_hub
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.sources import file_digest, find_part, is_local
from toolkit.data.split import limit, shuffle_key, take_shares
from toolkit.data.stored import load_splits, save_splits
from toolkit.errors import ConfigError, DataError

_REVISION = 2
"""To be raised with every change of this package that changes its result: older caches are then not used."""
_SPLITS = ("validation_share", "test_share", "train_texts", "split_seed", "deduplicate")
Place = Part | HubData


@dataclass(frozen=True)
class Rows:
    """What was read of a place.

    Attributes:
        texts: one column, `text`: string or null.
        faults: why rows were left out, a reason each, behind where it is.
    """

    texts: Dataset
    faults: tuple[tuple[str, str], ...] = ()


Reader = Callable[[Place, Role, Path], Iterator[Rows]]
"""Reads one place of a split; the folder is for the Arrow files behind the result."""


@dataclass(frozen=True)
class TextCorpus:
    """Texts in three splits.

    Attributes:
        splits: of each role; columns `text` (string) and `source` (int, index into the sources of the split).
        facts: what was read and dropped and is to be warned of; fit for JSON.
        fingerprint: of content and settings; the same on every machine.
    """

    splits: Mapping[Role, Dataset]
    facts: dict[str, Any]
    fingerprint: str


def text_corpus(config: CorpusConfig) -> TextCorpus:
    """Read, check, clear of repeats and split; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks, as `text_classification`.

    Raises:
        ConfigError: a setting that cannot take effect or is out of range.
        DataError: data that is missing, malformed or unfit.
    """
    read = functools.partial(_read_texts, text=config.text)
    return gather(config, read, {"text": config.text, "texts_in": config.texts_in}, texts_in=config.texts_in)


def gather(config: SourcesConfig, read: Reader, settings: Mapping[str, Any], *, texts_in: Any = None) -> TextCorpus:
    """The same for rows of any kind that `read` makes texts of.

    Args:
        config: where they are, and how they are split.
        read: makes texts of the rows of a place.
        settings: what it goes by, fit for JSON.
        texts_in: for .txt files, as in CorpusConfig; None where such files are none of this kind.
    """
    if not config.name or not all(config.name):
        raise ConfigError("--data.name is empty", "Give a file, a folder, a glob, a hub id or sample:NAME.")
    names: dict[Role, tuple[str, ...]] = {"train": config.name, "validation": config.validation, "test": config.test}
    _check_shares(config)
    places = {role: [_find(name, role, texts_in) for name in found] for role, found in names.items()}
    content = {role: [_digest(place) for place in found] for role, found in places.items()}
    name = fingerprint("texts", _REVISION, content, [getattr(config, key) for key in _SPLITS], settings)
    splits, facts = prepared(name, load_splits, functools.partial(_prepare, config, read, places))
    warnings = [place.warning for found in places.values() for place in found if isinstance(place, HubData)]
    facts |= {"sources": list(config.name), "warnings": [*filter(None, warnings), *facts["warnings"]]}
    return TextCorpus(splits, facts, name)


def _check_shares(config: SourcesConfig) -> None:
    held_out = (0 if config.validation else config.validation_share) + (0 if config.test else config.test_share)
    if held_out >= 1:
        raise ConfigError(
            f"--data.validation_share and --data.test_share hold out {held_out:g} of the data, which leaves none",
            "Set them lower.",
        )


def _find(name: str, role: Role, texts_in: Any) -> Place:
    key = "--data.name" if role == "train" else f"--data.{role}"
    if name.startswith("sample:"):
        return Part("jsonl", (samples.fetch(name.removeprefix("sample:")) / "data.jsonl",))
    if not is_local(name):
        return find(name, None)
    part = find_part(name, key, plain=texts_in is not None)
    return dataclasses.replace(part, texts_in=texts_in) if texts_in else part


def _digest(place: Place) -> list[Any]:
    if isinstance(place, HubData):
        return [place.name, place.commit]
    return [place.kind, *map(file_digest, place.files)]


def _prepare(
    config: SourcesConfig, read: Reader, places: Mapping[Role, Sequence[Place]], result: Path, scratch: Path
) -> None:
    """Write the splits and their facts to `result`."""
    tables, roles, sources = [], [], []
    faults: list[tuple[str, str]] = []
    for role, found in places.items():
        for number, place in enumerate(found):
            for piece in read(place, role, scratch):
                tables.append(piece.texts)
                faults += piece.faults
                roles += [ROLES.index(role)] * len(piece.texts)
                sources += [number] * len(piece.texts)
    texts = concatenate_datasets(tables)
    given = np.array(roles, np.int8)
    keyed = key_texts(texts, config.tokenize_processes, scratch)
    kept = np.where(keyed.blank, DROPPED, given).astype(np.int8)
    groups, one_class = group_texts(keyed.keys), np.zeros(len(kept), np.int32)
    repeats = 0
    if config.deduplicate:
        kept, repeats, _ = drop_repeats(kept, groups, one_class)
    kept, leaks = drop_leaks(kept, groups)
    order = shuffle_key(keyed.keys, config.split_seed)
    shares = {VALIDATION: config.validation_share, TEST: config.test_share}
    taken = {role: share for role, share in shares.items() if not places[ROLES[role]]}
    if np.sum(kept == TRAIN) <= len(taken):
        raise DataError(
            f"{int(np.sum(kept == TRAIN))} training texts are left after cleaning, which is too few to hold some out",
            "Give more texts; for .txt files, --data.texts_in paragraph or line makes more of one file.",
        )
    kept = take_shares(kept, one_class, order, taken, ("text",))
    if not config.deduplicate:
        kept, _ = drop_leaks(kept, groups)  # repeats may be trained on, but not tested on
    kept = limit(kept, TRAIN, config.train_texts, one_class, order)
    rows = {name: np.flatnonzero(kept == role) for role, name in enumerate(ROLES)}
    if empty := [name for name, chosen in rows.items() if not len(chosen)]:
        raise DataError(
            f"the {empty[0]} split has no texts left after cleaning",
            "All of its texts are also in another split: give other data, or leave this split out.",
        )
    dropped = {
        "malformed": len(faults),
        "blank": int(np.sum(keyed.blank)),
        "repeated": repeats,
        "in a held-out split": sum(leaks.values()),
    }
    facts = {
        "read": {name: int(np.sum(given == role)) for role, name in enumerate(ROLES)},
        "dropped": dropped,
        "texts": {name: len(chosen) for name, chosen in rows.items()},
        "warnings": _warnings(faults),
    }
    of_source = np.array(sources, np.int32)
    tables_of = {name: texts.select(chosen).add_column("source", of_source[chosen]) for name, chosen in rows.items()}
    save_splits(result, tables_of, facts)


def _warnings(faults: Sequence[tuple[str, str]]) -> list[str]:
    """One for all rows that were left out: how many for which reason, and where the first of them is."""
    counts = Counter(reason for _, reason in faults)
    first = {reason: where for where, reason in reversed(faults)}
    told = [f"{count:,} because {reason} (first: {first[reason]})" for reason, count in counts.most_common(5)]
    rest = f"; {len(counts) - len(told)} more reasons" if len(counts) > len(told) else ""
    return [f"{len(faults):,} malformed rows are left out: {'; '.join(told)}{rest}"] if faults else []


def _read_texts(place: Place, role: Role, scratch: Path, text: str) -> Iterator[Rows]:
    if isinstance(place, Part):
        for found in read_part(place, text, None, scratch):
            yield Rows(found.texts)
    else:
        splits = dict(read_hub(place, text, None))
        # Of a data set with splits the one of that role, where it has it.
        yield Rows(splits.get(role, splits["train"]).texts)
