"""Plain texts, from wherever they lie to three splits without repeats, once for all ranks of a machine."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, concatenate_datasets

from toolkit import samples
from toolkit.config import CorpusConfig, SourcesConfig
from toolkit.data.clean import DROPPED, TEST, TRAIN, VALIDATION, Roles, drop_leaks, drop_repeats, group_texts, key_texts
from toolkit.data.collect import collected
from toolkit.data.contamination import drop_contaminated
from toolkit.data.contents import Contents
from toolkit.data.files import ROLES, Part, Role, read_part
from toolkit.data.filters import check_filters, drop_unwanted
from toolkit.data.hub import HubData, find, read_hub
from toolkit.data.mapping import ROWS_FOR_A_BAR, normalised_texts, quiet
from toolkit.data.near import check_near, drop_near
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.sources import file_digest, find_parallel, find_part, is_local, sample_parts
from toolkit.data.split import check_folds, hold_out, hold_out_groups, keys_of_groups, limit, shuffle_key
from toolkit.data.stages import Stages
from toolkit.data.stored import load_splits, save_splits
from toolkit.errors import ConfigError, DataError
from toolkit.normalise import check_normalisation

_REVISION = 4
"""To be raised with every change of this package that changes its result: older caches are then not used."""
_SPLITS = ("validation_share", "test_share", "folds", "fold", "group", "train_texts", "split_seed", "deduplicate")
_CLEANING = ("normalise", "min_chars", "max_chars", "languages", "near_duplicates", "decontaminate")
Place = Part | HubData


@dataclass(frozen=True)
class Rows:
    """What was read of a place.

    Attributes:
        texts: one column, `text`: string or null.
        groups: strings or nulls, as many; None where they were not asked for.
        faults: why rows were left out, a reason each, behind where it is.
    """

    texts: Dataset
    groups: pa.ChunkedArray | None = None
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
    read = functools.partial(_read_texts, config=config)
    return gather(config, read, {"text": config.text, "texts_in": config.texts_in}, texts_in=config.texts_in)


def stream_texts(names: Sequence[str], text: str) -> Iterator[str]:
    """All texts of some sources in their order, with repeats and in no splits: to count or to read, not to train on.

    Args:
        names: of samples, files, folders or globs, and ids of the hub; a text of a .txt file is a paragraph.
        text: column that holds them.

    Raises:
        DataError: data that is missing or malformed.
    """
    as_found = CorpusConfig(text=text)
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(names):
            (Path(scratch) / str(number)).mkdir()
            for rows in _read_texts(_find(name, "train", "paragraph"), "train", Path(scratch) / str(number), as_found):
                for batch in rows.texts.iter(1000):
                    yield from filter(None, batch["text"])


def gather(
    config: SourcesConfig,
    read: Reader,
    settings: Mapping[str, Any],
    *,
    texts_in: Any = None,
    words: Callable[[str], str] = str,
) -> TextCorpus:
    """The same for rows of any kind that `read` makes texts of.

    Args:
        config: where they are, and how they are split.
        read: makes texts of the rows of a place.
        settings: what it goes by, fit for JSON.
        texts_in: for .txt files, as in CorpusConfig; None where such files are none of this kind.
        words: what a text says, where that is not all of it: by this it is filtered and compared; picklable.
    """
    return gather_places(config, read, find_places(config, texts_in), settings, words=words)


def gather_places(
    config: SourcesConfig,
    read: Reader,
    places: Mapping[Role, Sequence[Place]],
    settings: Mapping[str, Any],
    *,
    words: Callable[[str], str] = str,
) -> TextCorpus:
    """The same for places that have been found: those of each split, of which only `train` must have some."""
    check_normalisation(config.normalise)
    check_filters(config)
    check_near(config)
    _check_shares(config, places)
    content = {role: [_digest(place) for place in found] for role, found in places.items()}
    name = fingerprint("texts", _REVISION, content, [getattr(config, key) for key in _SPLITS + _CLEANING], settings)
    splits, facts = prepared(name, load_splits, functools.partial(_prepare, config, read, places, words))
    warnings = [place.warning for found in places.values() for place in found if isinstance(place, HubData)]
    facts |= {"sources": list(config.name), "warnings": [*filter(None, warnings), *facts["warnings"]]}
    return TextCorpus(splits, facts, name)


def find_places(config: SourcesConfig, texts_in: Any = None) -> dict[Role, list[Place]]:
    """Where the data of each split are; no split but that of training need have any.

    Raises:
        ConfigError: no name is given.
        DataError: a file is missing or of no kind that can be read.
    """
    if not config.name or not all(config.name):
        raise ConfigError("--data.name is empty", "Give a file, a folder, a glob, a hub id or sample:NAME.")
    names: dict[Role, tuple[str, ...]] = {"train": config.name, "validation": config.validation, "test": config.test}
    places = {role: [_find(name, role, texts_in) for name in found] for role, found in names.items()}
    for role in ROLES[1:]:
        places[role] = places[role] or _of_samples(config.name, role)
    return places


def _check_shares(config: SourcesConfig, places: Mapping[Role, Sequence[Place]]) -> None:
    check_folds(config, given_test=bool(places["test"]))
    held_out = (0 if places["validation"] else config.validation_share) + (
        0 if places["test"] or config.folds else config.test_share
    )
    if held_out >= 1:
        raise ConfigError(
            f"--data.validation_share and --data.test_share hold out {held_out:g} of the data, which leaves none",
            "Set them lower.",
        )


def _find(name: str, role: Role, texts_in: Any) -> Place:
    key = "--data.name" if role == "train" else f"--data.{role}"
    if name.startswith("sample:"):
        if "train" not in (parts := sample_parts(name)):
            raise DataError(
                f"{key} {name} is a model, not data",
                f"Data: {', '.join(f'sample:{known}' for known in samples.names('data'))}.",
            )
        return parts["train"]
    name = collected(name)
    if texts_in is None and (parallel := find_parallel(name, key)):
        return parallel
    if not is_local(name):
        return find(name, None)
    part = find_part(name, key, plain=texts_in is not None)
    return dataclasses.replace(part, texts_in=texts_in) if texts_in else part


def _of_samples(names: Sequence[str], role: Role) -> list[Place]:
    """The splits that samples among the sources bring along."""
    found = (sample_parts(name).get(role) for name in names if name.startswith("sample:"))
    return [part for part in found if part is not None]


def _digest(place: Place) -> list[Any]:
    if isinstance(place, HubData):
        return [place.name, place.commit]
    return [place.kind, *map(file_digest, place.files)]


@dataclass(frozen=True)
class _Read:
    """All rows that were read, in one numbering; `roles` are indices into ROLES."""

    texts: Dataset
    roles: Roles
    sources: npt.NDArray[np.int32]
    groups: pa.ChunkedArray | None
    faults: tuple[tuple[str, str], ...]


def _read_all(read: Reader, places: Mapping[Role, Sequence[Place]], scratch: Path) -> _Read:
    tables, roles, sources = [], [], []
    groups: list[pa.Array] = []
    faults: list[tuple[str, str]] = []
    for role, found in places.items():
        for number, place in enumerate(found):
            for piece in read(place, role, scratch):
                tables.append(piece.texts)
                groups += [] if piece.groups is None else piece.groups.chunks
                faults += piece.faults
                roles += [ROLES.index(role)] * len(piece.texts)
                sources += [number] * len(piece.texts)
    return _Read(
        concatenate_datasets(tables),
        np.array(roles, np.int8),
        np.array(sources, np.int32),
        pa.chunked_array(groups, pa.string()) if groups else None,
        tuple(faults),
    )


def _prepare(
    config: SourcesConfig,
    read: Reader,
    places: Mapping[Role, Sequence[Place]],
    words: Callable[[str], str],
    result: Path,
    scratch: Path,
) -> None:
    """Write the splits and their facts to `result`."""
    rows = _read_all(read, places, scratch)
    if not np.any(rows.roles == TRAIN):
        raise DataError(f"the training data has no rows that can be used{_because(rows.faults)}", "Mend or add rows.")
    contents = Contents(rows.texts, words, config.tokenize_processes, scratch)
    stages = Stages(rows.texts, words, [f"{where}: {why}" for where, why in rows.faults])
    given = {ROLES.index(role) for role in places if places[role]}
    kept, dropped, languages = _cleaned_and_split(config, rows, contents, given, stages)
    chosen = {name: np.flatnonzero(kept == role) for role, name in enumerate(ROLES)}
    if empty := [name for name, numbers in chosen.items() if not len(numbers)]:
        raise DataError(
            f"the {empty[0]} split has no texts left after cleaning{_of_these(dropped)}{_because(rows.faults)}",
            "Give more or other texts, hold out a larger share, or drop fewer.",
        )
    facts = {
        "read": {name: int(np.sum(rows.roles == role)) for role, name in enumerate(ROLES)},
        "dropped": dropped,
        "languages": languages,
        "texts": {name: len(numbers) for name, numbers in chosen.items()},
        "warnings": _warnings(rows.faults),
        "stages": stages.facts,
    }
    with quiet(bars=len(kept) >= ROWS_FOR_A_BAR):
        tables = {name: rows.texts.select(at).add_column("source", rows.sources[at]) for name, at in chosen.items()}
    save_splits(result, tables, facts)


def _cleaned_and_split(
    config: SourcesConfig, rows: _Read, contents: Contents, given: Container[int], stages: Stages
) -> tuple[Roles, dict[str, int], dict[str, int]]:
    """The split of each row or `DROPPED`; how many rows were dropped for which reason; how many texts were in which
    language.
    """
    keyed = key_texts(rows.texts, config.tokenize_processes, contents.scratch)
    groups, one_class = group_texts(keyed.keys), np.zeros(len(rows.roles), np.int32)
    kept = np.where(keyed.blank, DROPPED, rows.roles).astype(np.int8)
    stages.note("blank", kept)
    kept, unwanted, languages = drop_unwanted(contents, kept, config)
    if unwanted:
        stages.note("length and language", kept)
    repeats = 0
    if config.deduplicate:
        kept, repeats, _ = drop_repeats(kept, groups, one_class)
        stages.note("repeats", kept)
    kept, leaks = drop_leaks(kept, groups)
    stages.note("in a held-out split", kept)
    # Before the split, so that no text is held out while one like it is trained on.
    kept, near = drop_near(contents, kept, keyed.keys, config.near_duplicates)
    if near:
        stages.note("near-duplicates", kept)
    dropped = {"malformed": len(rows.faults), "blank": int(np.sum(keyed.blank)), **unwanted, "repeated": repeats}
    dropped |= {"in a held-out split": sum(leaks.values()), **near}
    order = shuffle_key(keyed.keys, config.split_seed)
    taken = {role for role in (VALIDATION, TEST) if role not in given}
    if np.sum(kept == TRAIN) <= len(taken):
        raise DataError(
            f"{int(np.sum(kept == TRAIN))} training texts are left after cleaning{_of_these(dropped)}, which is too "
            f"few to hold some out{_because(rows.faults)}",
            "Give more texts; for .txt files, --data.texts_in paragraph or line makes more of one file.",
        )
    if rows.groups is None:
        kept = hold_out(config, kept, one_class, order, taken, ("text",))
    else:
        kept, parted = hold_out_groups(config, kept, keys_of_groups(rows.groups, keyed.keys), taken)
        dropped |= {"of a group in a held-out split": parted}
        stages.note("of a group in a held-out split", kept)
    if not config.deduplicate:
        kept, _ = drop_leaks(kept, groups)  # repeats may be trained on, but not tested on
    kept, contaminated = drop_contaminated(contents, kept, config.decontaminate)
    if contaminated:
        stages.note("passages of a held-out split", kept)
    kept = limit(kept, TRAIN, config.train_texts, one_class, order)
    stages.note("beyond the wished number", kept)
    return kept, dropped | contaminated, languages


def _of_these(dropped: Mapping[str, int]) -> str:
    told = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count)
    return f" (dropped: {told})" if told else ""


def _because(faults: Sequence[tuple[str, str]]) -> str:
    """Why rows were left out, behind an error that they led to."""
    return f"; {_warnings(faults)[0]}" if faults else ""


def _warnings(faults: Sequence[tuple[str, str]]) -> list[str]:
    """One for all rows that were left out: how many for which reason, and where the first of them is."""
    counts = Counter(reason for _, reason in faults)
    first = {reason: where for where, reason in reversed(faults)}
    told = [f"{count:,} because {reason} (first: {first[reason]})" for reason, count in counts.most_common(5)]
    rest = f"; {len(counts) - len(told)} more reasons" if len(counts) > len(told) else ""
    return [f"{len(faults):,} malformed rows are left out: {'; '.join(told)}{rest}"] if faults else []


def _read_texts(place: Place, role: Role, scratch: Path, config: CorpusConfig) -> Iterator[Rows]:
    if isinstance(place, Part):
        tables = read_part(place, config.text, None, scratch, config.group)
    else:
        splits = dict(read_hub(place, config.text, None, config.group))
        # Of a data set with splits the one of that role, where it has it.
        tables = iter([splits.get(role, splits["train"])])
    for found in tables:
        title = f"Normalising {len(list(scratch.iterdir()))}"
        yield Rows(
            normalised_texts(
                found.texts, config.normalise, processes=config.tokenize_processes, scratch=scratch, title=title
            ),
            found.groups,
        )
