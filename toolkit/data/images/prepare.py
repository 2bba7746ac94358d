"""Labelled images, from wherever they lie to three splits, once for all ranks of a machine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
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
from toolkit.data.split import check_shares, keys_of_groups, split
from toolkit.data.stored import load_splits, save_splits
from toolkit.errors import ConfigError, DataError

_REVISION = 2
"""To be raised with every change of this package that changes its result: older caches are then not used."""
_NOT_CONTENT = ("name", "validation", "test", "workers", "decode_processes", "max_bad_rows")
_FOUND = Features(
    {
        name: Value(kind)
        for name, kind in (
            ("image", "binary"),
            ("label", "string"),
            ("group", "string"),
            ("where", "string"),
            ("fault", "string"),
            ("role", "int8"),
        )
    }
)
_SEEN = Features({"fault": Value("string"), "high": Value("uint64"), "low": Value("uint64"), "grey": Value("bool")})
_MEASURED = Features({name: Sequence(Value("float64")) for name in ("means", "squares")})
_STATISTICS = "statistics.json"


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
    name = fingerprint("images", _REVISION, digest_images(source), settings)
    splits, facts = prepared(name, load_splits, functools.partial(_prepare, config, source))
    if facts["unfit_dropped"] > config.max_bad_rows:  # by the bound of an earlier run
        raise _too_many(facts["faults"], facts["unfit_dropped"], config.max_bad_rows)
    processor = dataclasses.replace(wanted, channels=wanted.channels or facts["channels"])
    if not processor.mean:
        processor = _measured(processor, splits["train"], name, config.decode_processes)
    return ImageData(
        **{str(role): rows for role, rows in splits.items()},
        labels=tuple(facts["labels"]),
        processor=processor,
        facts={"source": config.name, **facts},
        fingerprint=fingerprint(name, dataclasses.astuple(processor)),
    )


def _measured(processor: ImageProcessor, train: Dataset, name: str, processes: int | None) -> ImageProcessor:
    """With mean and spread of the training images as this processor prepares them; measured once, and kept."""
    what = fingerprint("image statistics", _REVISION, name, dataclasses.astuple(processor))
    mean, std = prepared(what, _load_statistics, functools.partial(_measure, processor, train, processes))
    return dataclasses.replace(processor, mean=tuple(mean), std=tuple(std))


def _load_statistics(folder: Path) -> tuple[list[float], list[float]] | None:
    try:
        found = json.loads((folder / _STATISTICS).read_text(encoding="utf-8"))
        return found["mean"], found["std"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _measure(processor: ImageProcessor, train: Dataset, processes: int | None, result: Path, scratch: Path) -> None:
    """Write mean and spread over all pixels to `result`."""
    work = functools.partial(_measure_some, processor=processor)
    rows = _mapped(train.select_columns("image"), work, _MEASURED, processes=processes, scratch=scratch)
    # All images are of one size: the mean of their means is the mean of all pixels.
    means, squares = (np.array(rows.column(column).to_pylist()).mean(0).tolist() for column in _MEASURED)
    mean, std = mean_and_std(means, squares)
    (result / _STATISTICS).write_text(json.dumps({"mean": mean, "std": std}), encoding="utf-8")


def _measure_some(images: list[bytes], *, processor: ImageProcessor) -> dict[str, Any]:
    values = [processor.pixels(open_image(image)).double() / 255 for image in images]
    return {
        "means": [pixels.mean((1, 2)).tolist() for pixels in values],
        "squares": [pixels.square().mean((1, 2)).tolist() for pixels in values],
    }


def _prepare(config: ImageDataConfig, source: Source, result: Path, scratch: Path) -> None:
    """Write the splits and their facts to `result`."""
    table = _read(config, source, scratch)
    seen = _look(table, config, scratch)
    fit, faults = _fit(table, seen, config)
    table = table.select(fit)
    columns = {name: np.asarray(column)[fit] for name, column in seen.items() if name != "fault"}
    roles = np.asarray(table["role"], np.int8)
    given = [ROLES[role] for role in np.unique(roles)]
    cleaned = _clean(table, roles, columns, config)
    units = None
    if config.group is not None:
        units = keys_of_groups(table.select_columns(["group"]).with_format("arrow")[:].column("group"), cleaned.keys)
    chosen = split(config, cleaned, given, units)
    facts: dict[str, Any] = {
        "labels": cleaned.labels,
        "stages": _stages(faults, len(table), cleaned.dropped, int(np.sum(chosen.roles != DROPPED))),
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
        splits[name] = table.select(rows).select_columns(["image", "where"])
        with quiet(bars=False):
            for column, values in (("label", codes), ("length", np.ones_like(codes)), ("id", np.arange(len(rows)))):
                splits[name] = splits[name].add_column(column, values)
        if name == "train":
            grey = bool(columns["grey"][rows].all()) if config.channels == "auto" else config.channels == "grey"
            facts["channels"] = 1 if grey else 3
    save_splits(result, splits, facts)


def _read(config: ImageDataConfig, source: Source, scratch: Path) -> Dataset:
    """All images on the disk, in one numbering: training rows first, then validation, then test."""
    places = [(role, source[role]) for role in ROLES if role in source]
    columns = {key: name for key in ("image", "label", "group") if (name := getattr(config, key)) is not None}
    with quiet(bars=False):
        try:
            table = Dataset.from_generator(
                functools.partial(_rows, places, columns),
                features=_FOUND,
                cache_dir=str(scratch / "rows"),
                fingerprint="images",
            )
        except Exception as error:  # `datasets` wraps what the generator raises
            raise (error.__cause__ if isinstance(error.__cause__, DataError) else error) from error
    return table


def _rows(places: list[tuple[Role, Place]], columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for role, place in places:
        for found in read_images(place, columns):
            yield {
                "image": found.data,
                "label": found.label,
                "group": found.group,
                "where": found.where,
                "fault": found.fault or None,
                "role": ROLES.index(role),
            }


def _look(table: Dataset, config: ImageDataConfig, scratch: Path) -> dict[str, Any]:
    """Decode each image once: whether it is fit, what its pixels are, and whether they are grey."""
    work = functools.partial(_look_at, min_side=config.min_side)
    seen = _mapped(
        table.select_columns(["image", "fault"]), work, _SEEN, processes=config.decode_processes, scratch=scratch
    )
    numbers = {name: seen.column(name).to_numpy() for name in ("high", "low", "grey")}
    return {"fault": seen.column("fault").to_pylist(), **numbers}


def _mapped(table: Dataset, work: Any, features: Features, *, processes: int | None, scratch: Path) -> pa.Table:
    """What `work` makes of the columns of a table, in as many processes as it is worth."""
    count = process_count(len(table), processes)
    with quiet(bars=len(table) >= ROWS_FOR_A_BAR):
        rows = table.map(
            work,
            batched=True,
            batch_size=100,
            input_columns=table.column_names,
            remove_columns=table.column_names,
            features=features,
            num_proc=count if count > 1 else None,
            new_fingerprint="seen",
            cache_file_name=str(scratch / "seen.arrow"),
            load_from_cache_file=False,
            desc="Looking at the images",
        )
        return rows.with_format("arrow")[:]


def _look_at(images: list[bytes], faults: list[str | None], *, min_side: int) -> dict[str, Any]:
    rows = [_look_at_one(image, fault, min_side) for image, fault in zip(images, faults, strict=True)]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in _SEEN}
    # As an array: a list of numbers would be taken for signed ones.
    return columns | {name: np.array(columns[name], np.uint64) for name in ("high", "low")}


def _look_at_one(data: bytes, fault: str | None, min_side: int) -> dict[str, Any]:
    row: dict[str, Any] = {"fault": fault, "high": 0, "low": 0, "grey": True}
    if fault is not None:
        return row
    try:
        image = open_image(data, min_side)
    except Unfit as reason:
        return row | {"fault": str(reason)}
    grey = is_grey(image)
    flat = image.convert("L" if grey else "RGB")
    # The same picture in another kind of file is the same picture.
    key = hashlib.blake2b(flat.tobytes() + repr(flat.size).encode(), digest_size=16).digest()
    high, low = np.frombuffer(key, "<u8").tolist()
    return row | {"high": high, "low": low, "grey": grey}


def _stages(faults: list[str], fit: int, dropped: Mapping[str, int], kept: int) -> list[dict[str, Any]]:
    """How many images each stage was given and has left, as the report shows them."""
    left = {"unfit": fit}
    left["repeats"] = left["unfit"] - dropped["duplicates_dropped"] - dropped["conflicts_dropped"]
    held_out = dropped["leaks_dropped"] + dropped["validation_rows_in_test_dropped"]
    left["in a held-out split"] = left["repeats"] - held_out
    left["limits"] = kept
    given = [fit + len(faults), *left.values()]
    return [
        {"stage": name, "in": before, "out": after, "examples": faults[:5] if name == "unfit" else []}
        for (name, after), before in zip(left.items(), given[:-1], strict=True)
    ]


def _fit(table: Dataset, seen: Mapping[str, Any], config: ImageDataConfig) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Rows that are fit, and what is wrong with the others."""
    unfit = [row for row, fault in enumerate(seen["fault"]) if fault is not None]
    places = table.select(unfit)["where"] if unfit else []
    faults = [f"{where}, because {seen['fault'][row]}" for where, row in zip(places, unfit, strict=True)]
    if len(faults) > config.max_bad_rows or len(faults) == len(table):
        raise (
            _too_many(faults, len(faults), config.max_bad_rows)
            if faults
            else DataError("there is no image", "Give some.")
        )
    return np.setdiff1d(np.arange(len(table)), np.array(unfit, np.int64)), faults


def _too_many(faults: list[str], count: int, most: int) -> DataError:
    return DataError(
        f"{count:,} images cannot be learnt from, as {'; '.join(faults[:5])}",
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
