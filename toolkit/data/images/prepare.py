"""Labelled images, from wherever they lie to three splits, once for all ranks of a machine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Features, Sequence, Value

from toolkit.config import ImageDataConfig
from toolkit.data.clean import DROPPED, Cleaned, check_classes, check_labels, code_labels, drop_leaks, drop_repeats
from toolkit.data.clean import group_texts as group_keys
from toolkit.data.files import ROLES, Role
from toolkit.data.images.processor import ImageProcessor, is_grey, mean_and_std, open_image
from toolkit.data.images.sources import Place, Source, digest_images, read_images, resolve_images
from toolkit.data.mapping import ROWS_FOR_A_BAR, process_count, quiet
from toolkit.data.prepared import fingerprint, prepared
from toolkit.data.rows import Unfit
from toolkit.data.split import check_shares, split
from toolkit.data.stored import load_splits, save_splits
from toolkit.errors import ConfigError, DataError

_REVISION = 1
"""To be raised with every change of this package that changes its result: older caches are then not used."""
_NOT_CONTENT = ("name", "validation", "test", "workers", "decode_processes", "max_bad_rows")
_FOUND = Features(
    {
        name: Value(kind)
        for name, kind in (
            ("image", "binary"),
            ("label", "string"),
            ("where", "string"),
            ("fault", "string"),
            ("role", "int8"),
        )
    }
)
_SEEN = Features(
    {
        "fault": Value("string"),
        "high": Value("uint64"),
        "low": Value("uint64"),
        "grey": Value("bool"),
        "means": Sequence(Value("float64"), 4),
        "squares": Sequence(Value("float64"), 4),
    }
)


@dataclass(frozen=True)
class ImageData:
    """Images with their classes.

    Attributes:
        train: columns `image` (bytes of a file), `label` (int, index into `labels`), `where` (string), `length`
            (int, 1: all cost alike) and `id` (int, from 0).
        validation: the same.
        test: the same.
        labels: names of the classes, sorted; as numbers if all of them are integers.
        processor: how they are prepared: as the network was trained, or by the mean and spread of `train`.
        facts: what was read, dropped, counted and is to be warned of; fit for JSON.
        fingerprint: of content, settings and processor; the same on every machine.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    labels: tuple[str, ...]
    processor: ImageProcessor
    facts: dict[str, Any]
    fingerprint: str


def image_classification(config: ImageDataConfig, wanted: ImageProcessor) -> ImageData:
    """Read, check, clean, split and measure; the second call with the same content loads the result.

    To be called before the process group exists, on all ranks: of those that share a cache, one does the work and the
    others wait for it, for as long as it takes.

    Args:
        config: which data, and how.
        wanted: what the network reads; what it leaves open follows from the training split.

    Raises:
        ConfigError: a setting that cannot take effect or is out of range.
        DataError: data that is missing, malformed or unfit.
    """
    if wanted.channels and config.channels != "auto":
        raise ConfigError(
            f"--data.channels {config.channels} has no effect: the network reads {wanted.channels}", "Leave it at auto."
        )
    source = resolve_images(config)
    check_shares(config, source)
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_CONTENT}
    # Statistics go by side and filter; what the network brings with it is not of the data.
    name = fingerprint("images", _REVISION, digest_images(source), settings, wanted.size, wanted.edge, wanted.resample)
    splits, facts = prepared(name, load_splits, functools.partial(_prepare, config, source, wanted))
    if len(facts["faults"]) > config.max_bad_rows:  # by the bound of an earlier run
        raise _too_many(facts["faults"], config.max_bad_rows)
    processor = _settled(wanted, facts)
    content = fingerprint(name, dataclasses.astuple(processor))
    return ImageData(
        **{str(role): rows for role, rows in splits.items()},
        labels=tuple(facts["labels"]),
        processor=processor,
        facts={"source": config.name, **facts},
        fingerprint=content,
    )


def _settled(wanted: ImageProcessor, facts: Mapping[str, Any]) -> ImageProcessor:
    """With what the network leaves open: channels, mean and spread of the training images."""
    channels = wanted.channels or facts["channels"]
    if wanted.mean:
        return dataclasses.replace(wanted, channels=channels)
    mean, std = facts["statistics"][str(channels)]
    return dataclasses.replace(wanted, channels=channels, mean=tuple(mean), std=tuple(std))


def _prepare(config: ImageDataConfig, source: Source, wanted: ImageProcessor, result: Path, scratch: Path) -> None:
    """Write the splits and their facts to `result`."""
    table = _read(config, source, scratch)
    seen = _look(table, config, wanted, scratch)
    fit, faults = _fit(table, seen, config)
    table = table.select(fit)
    columns = {name: np.asarray(column)[fit] for name, column in seen.items() if name not in ("fault", "labels")}
    roles = np.asarray(table["role"], np.int8)
    given = [ROLES[role] for role in np.unique(roles)]
    cleaned = _clean(table, roles, columns, config)
    chosen = split(config, cleaned, given)
    facts: dict[str, Any] = {
        "labels": cleaned.labels,
        "rows_read": {name: int(np.sum(roles == role)) for role, name in enumerate(ROLES) if name in given},
        **cleaned.dropped,
        "unfit_dropped": len(faults),
        "faults": faults[: config.max_bad_rows],
        "samples": {},
        "warnings": [*_told(faults), *cleaned.warnings, *chosen.warnings],
    }
    splits: dict[Role, Dataset] = {}
    for role, name in enumerate(ROLES):
        rows = np.flatnonzero(chosen.roles == role)
        codes = cleaned.codes[rows].astype(np.int64)
        counts = np.bincount(codes, minlength=len(cleaned.labels))
        facts["samples"][name] = dict(zip(cleaned.labels, counts.tolist(), strict=True))
        kept = table.select(rows).select_columns(["image", "where"])
        for column, values in (("label", codes), ("length", np.ones_like(codes)), ("id", np.arange(len(rows)))):
            kept = kept.add_column(column, values)
        splits[name] = kept
        if name == "train":
            facts |= _statistics(columns, rows, config)
    save_splits(result, splits, facts)


def _statistics(columns: Mapping[str, npt.NDArray[Any]], rows: npt.NDArray[np.int64], config: ImageDataConfig) -> Any:
    """Of the training images alone, for each number of channels that a network may ask for."""
    means, squares = (columns[name][rows].mean(0).tolist() for name in ("means", "squares"))
    grey = bool(columns["grey"][rows].all()) if config.channels == "auto" else config.channels == "grey"
    return {
        "channels": 1 if grey else 3,
        "statistics": {"1": mean_and_std(means[:1], squares[:1]), "3": mean_and_std(means[1:], squares[1:])},
    }


def _read(config: ImageDataConfig, source: Source, scratch: Path) -> Dataset:
    """All images on the disk, in one numbering: training rows first, then validation, then test."""
    places = [(role, source[role]) for role in ROLES if role in source]
    with quiet(bars=False):
        try:
            table = Dataset.from_generator(
                functools.partial(_rows, places, config.image, config.label),
                features=_FOUND,
                cache_dir=str(scratch / "rows"),
                fingerprint="images",
            )
        except Exception as error:  # `datasets` wraps what the generator raises
            raise (error.__cause__ if isinstance(error.__cause__, DataError) else error) from error
    return table


def _rows(places: list[tuple[Role, Place]], image: str, label: str) -> Iterator[dict[str, Any]]:
    for role, place in places:
        for found in read_images(place, image, label):
            yield {
                "image": found.data,
                "label": found.label,
                "where": found.where,
                "fault": found.fault or None,
                "role": ROLES.index(role),
            }


def _look(table: Dataset, config: ImageDataConfig, wanted: ImageProcessor, scratch: Path) -> dict[str, Any]:
    """Decode each image once: whether it is fit, what its pixels are, and their mean and mean square."""
    count = process_count(len(table), config.decode_processes)
    with quiet(bars=len(table) >= ROWS_FOR_A_BAR):
        seen = table.map(
            functools.partial(_look_at, min_side=config.min_side, wanted=wanted),
            batched=True,
            batch_size=100,
            input_columns=["image", "fault"],
            remove_columns=table.column_names,
            features=_SEEN,
            num_proc=count if count > 1 else None,
            new_fingerprint="seen",
            cache_file_name=str(scratch / "seen.arrow"),
            load_from_cache_file=False,
            desc="Looking at the images",
        )
    columns = seen.with_format("arrow")[:]
    found: dict[str, Any] = {name: columns.column(name).to_numpy() for name in ("high", "low", "grey")}
    found |= {name: np.array(columns.column(name).to_pylist()) for name in ("means", "squares")}
    return {"fault": columns.column("fault").to_pylist(), **found}


def _look_at(images: list[bytes], faults: list[str | None], *, min_side: int, wanted: ImageProcessor) -> dict[str, Any]:
    rows = [_look_at_one(image, fault, min_side, wanted) for image, fault in zip(images, faults, strict=True)]
    columns = {name: [row[name] for row in rows] for name in _SEEN}
    # As an array: a list of numbers would be taken for signed ones.
    return columns | {name: np.array(columns[name], np.uint64) for name in ("high", "low")}


def _look_at_one(data: bytes, fault: str | None, min_side: int, wanted: ImageProcessor) -> dict[str, Any]:
    row: dict[str, Any] = {"fault": fault, "high": 0, "low": 0, "grey": True, "means": [0.0] * 4, "squares": [0.0] * 4}
    try:
        if fault is not None:
            return row
        image = open_image(data, min_side)
    except Unfit as reason:
        return row | {"fault": str(reason)}
    grey = is_grey(image)
    flat = image.convert("L" if grey else "RGB")
    # The same picture in another kind of file is the same picture.
    key = hashlib.blake2b(flat.tobytes() + repr(flat.size).encode(), digest_size=16).digest()
    high, low = np.frombuffer(key, "<u8").tolist()
    means: list[float] = []
    squares: list[float] = []
    for channels in (1, 3):
        values = wanted.pixels(image, channels).double() / 255
        means += values.mean((1, 2)).tolist()
        squares += values.square().mean((1, 2)).tolist()
    return {"fault": None, "high": high, "low": low, "grey": grey, "means": means, "squares": squares}


def _fit(table: Dataset, seen: Mapping[str, Any], config: ImageDataConfig) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Rows that are fit, and what is wrong with the others."""
    unfit = [row for row, fault in enumerate(seen["fault"]) if fault is not None]
    places = table.select(unfit)["where"] if unfit else []
    faults = [f"{where}, because {seen['fault'][row]}" for where, row in zip(places, unfit, strict=True)]
    if len(faults) > config.max_bad_rows or len(faults) == len(table):
        raise _too_many(faults, config.max_bad_rows) if faults else DataError("there is no image", "Give some.")
    return np.setdiff1d(np.arange(len(table)), np.array(unfit, np.int64)), faults


def _too_many(faults: list[str], most: int) -> DataError:
    return DataError(
        f"{len(faults):,} images cannot be learnt from, as {'; '.join(faults[:5])}",
        f"Mend or remove them, or raise --data.max_bad_rows above {most}.",
    )


def _told(faults: list[str]) -> list[str]:
    if not faults:
        return []
    more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
    return [f"{len(faults)} images are left out: {'; '.join(faults[:5])}{more}"]


class _Corpus:
    """The rows that are fit, as the cleaning names them in errors."""

    def __init__(self, table: Dataset) -> None:
        self._table = table

    def where(self, row: int) -> str:
        """Of a row, as its source has it."""
        return cast(str, self._table[row]["where"])


def _clean(
    table: Dataset, roles: npt.NDArray[np.int8], columns: Mapping[str, npt.NDArray[Any]], config: ImageDataConfig
) -> Cleaned:
    """Drop repeats, contradictions and leaks, by the pixels; refuse what no cleaning can mend."""
    codes, names = code_labels(pa.chunked_array([pa.array(table["label"], pa.string())]))
    check_labels(codes, names, config.label)
    keys = np.stack([columns["high"], columns["low"]], axis=1)
    groups = group_keys(keys)
    duplicates = conflicts = 0
    if config.deduplicate:
        roles, duplicates, conflicts = drop_repeats(roles, groups, codes)
    roles, leaks = drop_leaks(roles, groups)
    classes = check_classes(_Corpus(table), roles, codes, names)
    dropped = {
        "duplicates_dropped": duplicates,
        "conflicts_dropped": conflicts,
        "leaks_dropped": leaks["train"],
        "validation_rows_in_test_dropped": leaks["validation"],
    }
    told = {
        "duplicates_dropped": "training images were dropped because their pixels are those of an earlier one",
        "conflicts_dropped": "training images were dropped because their pixels stand under two labels",
        "leaks_dropped": "training images were dropped because their pixels are also in validation or test",
        "validation_rows_in_test_dropped": "validation images were dropped because their pixels are also in test",
    }
    warnings = tuple(f"{count} {told[key]}" for key, count in dropped.items() if count)
    new_code = np.full(len(names) + 1, DROPPED, np.int32)
    new_code[classes] = np.arange(len(classes))
    labels = tuple(names[code] for code in classes)
    return Cleaned(roles, new_code[codes], labels, keys, groups, dropped, warnings)
