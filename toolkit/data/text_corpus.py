"""Plain texts, from wherever they lie to three splits without repeats, once for all ranks of a machine."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, concatenate_datasets, load_from_disk

from toolkit import samples
from toolkit.config import CorpusConfig
from toolkit.data.clean import DROPPED, TEST, TRAIN, VALIDATION, drop_leaks, drop_repeats, group_texts, key_texts
from toolkit.data.files import ROLES, Labelled, Part, Role, read_part
from toolkit.data.hub import HubData, find, read_hub
from toolkit.data.mapping import ROWS_FOR_A_BAR, quiet
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.sources import file_digest, find_part, is_local
from toolkit.data.split import limit, shuffle_key, take_shares
from toolkit.errors import ConfigError, DataError

_REVISION = 1
"""To be raised with every change of this package that changes its result: older caches are then not used."""
_FACTS = "facts.json"
_CONTENT = ("text", "texts_in", "validation_share", "test_share", "train_texts", "split_seed", "deduplicate")
Place = Part | HubData


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
    if not config.name or not all(config.name):
        raise ConfigError("--data.name is empty", "Give a file, a folder, a glob, a hub id or sample:NAME.")
    names: dict[Role, tuple[str, ...]] = {"train": config.name, "validation": config.validation, "test": config.test}
    _check_shares(config)
    places = {role: [_find(name, role, config) for name in found] for role, found in names.items()}
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key in _CONTENT}
    content = {role: [_digest(place) for place in found] for role, found in places.items()}
    name = fingerprint("texts", _REVISION, content, settings)
    splits, facts = prepared(name, _load, functools.partial(_prepare, config, places))
    warnings = [place.warning for found in places.values() for place in found if isinstance(place, HubData)]
    facts |= {"sources": list(config.name), "warnings": [*filter(None, warnings), *facts["warnings"]]}
    return TextCorpus(splits, facts, name)


def _check_shares(config: CorpusConfig) -> None:
    held_out = (0 if config.validation else config.validation_share) + (0 if config.test else config.test_share)
    if held_out >= 1:
        raise ConfigError(
            f"--data.validation_share and --data.test_share hold out {held_out:g} of the texts, which leaves none",
            "Set them lower.",
        )


def _find(name: str, role: Role, config: CorpusConfig) -> Place:
    key = "--data.name" if role == "train" else f"--data.{role}"
    if name.startswith("sample:"):
        part = Part("jsonl", (samples.fetch(name.removeprefix("sample:")) / "data.jsonl",))
    elif is_local(name):
        part = find_part(name, key, plain=True)
    else:
        return find(name, None)
    return dataclasses.replace(part, texts_in=config.texts_in)


def _digest(place: Place) -> list[Any]:
    if isinstance(place, HubData):
        return [place.name, place.commit]
    return [place.kind, *map(file_digest, place.files)]


def _load(folder: Path) -> tuple[dict[Role, Dataset], dict[str, Any]] | None:
    try:
        facts: dict[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        with quiet(bars=False):
            splits = {name: load_from_disk(str(folder / name)) for name in ROLES}
        whole = all(len(splits[name]) == facts["texts"][name] for name in ROLES)
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException):
        return None
    return (splits, facts) if whole else None


def _prepare(config: CorpusConfig, places: Mapping[Role, Sequence[Place]], result: Path, scratch: Path) -> None:
    """Write the splits and their facts to `result`."""
    tables, roles, sources = [], [], []
    for role, found in places.items():
        for number, place in enumerate(found):
            for piece in _read(place, role, config.text, scratch):
                tables.append(piece.texts)
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
        "blank": int(np.sum(keyed.blank)),
        "repeated": repeats,
        "in a held-out split": sum(leaks.values()),
    }
    facts = {
        "read": {name: int(np.sum(given == role)) for role, name in enumerate(ROLES)},
        "dropped": dropped,
        "texts": {name: len(chosen) for name, chosen in rows.items()},
        "warnings": [],
    }
    for name, chosen in rows.items():
        with quiet(bars=len(chosen) >= ROWS_FOR_A_BAR):
            table = texts.select(chosen).add_column("source", np.array(sources, np.int32)[chosen])
            table.save_to_disk(str(result / name))
    (result / _FACTS).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _read(place: Place, role: Role, text: str, scratch: Path) -> list[Labelled]:
    if isinstance(place, Part):
        return list(read_part(place, text, None, scratch))
    splits = dict(read_hub(place, text, None))
    # Of a data set with splits the one of that role, where it has it.
    return [splits.get(role, splits["train"])]
