"""Where labelled images come from: a sample, folders of files, or tables; and what belongs to which split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import samples
from toolkit.config import ImageDataConfig
from toolkit.data.files import ROLE_OF_WORD, Part, Role, check_columns
from toolkit.data.images.processor import SUFFIXES
from toolkit.data.rows import Unfit, group_of, rows_of_file
from toolkit.data.sources import file_digest, find_part
from toolkit.errors import ConfigError, DataError


@dataclass(frozen=True)
class Photos:
    """A folder of images for each class.

    Attributes:
        files: in the order of their names.
        classes: of each of them.
    """

    files: tuple[Path, ...]
    classes: tuple[str, ...]


Place = Photos | Part
Source = Mapping[Role, Place]


@dataclass(frozen=True)
class Found:
    """An image as its source has it.

    Attributes:
        data: bytes of its file; empty where there is a fault.
        label: its class.
        where: it stands, for messages.
        group: what keeps it together with others; None where it stands alone.
        fault: why it is unfit; empty where nothing is known yet.
    """

    data: bytes
    label: str
    where: str
    group: str | None = None
    fault: str = ""


def resolve_images(config: ImageDataConfig) -> Source:
    """Find the files of every split; read nothing yet.

    Raises:
        ConfigError: an unknown sample, or one column for both.
        DataError: something is missing, or a folder holds what cannot be told apart.
    """
    if config.image == config.label:
        raise ConfigError(
            f"--data.image and --data.label both name the column '{config.image}'", "Name the column of the classes."
        )
    if config.group in (config.image, config.label):
        raise ConfigError(f"--data.group {config.group} is the image or the label too", "Name another column.")
    if config.name.startswith("sample:"):
        found = _sample(config.name)
    else:
        found = _splits(Path(config.name).expanduser(), "--data.name")
    given: tuple[tuple[Role, str | None], ...] = (("validation", config.validation), ("test", config.test))
    for role, name in given:
        if name is not None:
            found[role] = _place(Path(name).expanduser(), f"--data.{role}")
    return found


def digest_images(source: Source) -> str:
    """SHA-256 (hex) over the content of a source, and the names of classes; of images that a table names, too."""
    content = {role: _content(place) for role, place in source.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_images(place: Place, columns: Mapping[str, str]) -> Iterator[Found]:
    """All images of a split.

    Args:
        place: where they lie.
        columns: of the paths or bytes (`image`), of the classes (`label`), and of what keeps images together (`group`),
            if anything does.

    Raises:
        DataError: there are no columns, or a table lacks a column or cannot be read.
    """
    if isinstance(place, Photos):
        if "group" in columns:
            raise DataError(
                f"folders of images have no column '{columns['group']}'", "Leave --data.group out, or give a table."
            )
        for file, name in zip(place.files, place.classes, strict=True):
            yield _of_file(file, name, str(file))
        return
    for table in place.files:
        try:
            for number, row in enumerate(rows_of_file(table, place.kind), start=1):
                where = f"row {number} of {table}"
                try:
                    if isinstance(row, Unfit):
                        raise row
                    if None in row:
                        raise Unfit("it has more fields than the first line names")
                    check_columns(list(row), columns, str(table))
                    found = _of_row(row[columns["image"]], row[columns["label"]], table.parent, where)
                    yield dataclasses.replace(found, group=group_of(row, columns.get("group")))
                except Unfit as reason:
                    yield Found(b"", "", where, fault=str(reason))
        except (OSError, ValueError) as error:  # pyarrow's errors are among these
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{table} cannot be read: {first}", "Check that its content is what its name says."
            ) from error


def _of_row(image: Any, label: Any, folder: Path, where: str) -> Found:
    name = "" if label is None else str(label).strip()
    if not name:
        raise Unfit("it has no label")
    if isinstance(image, Mapping):  # as data sets of the hub have it
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return Found(image, name, where)
    if not isinstance(image, str) or not image.strip():
        raise Unfit("it has no image")
    return _of_file(folder / image.strip(), name, where)


def _of_file(file: Path, label: str, where: str) -> Found:
    try:
        return Found(file.read_bytes(), label, where)
    except FileNotFoundError:
        return Found(b"", label, where, fault=f"there is no file {file}")
    except OSError as error:
        return Found(b"", label, where, fault=f"{file} cannot be read: {error.strerror}")


def _sample(name: str) -> dict[Role, Place]:
    """The Parquet files of a sample, each for the split that it is called like."""
    files = sorted(samples.fetch(name.removeprefix("sample:")).glob("*.parquet"))
    if not files:
        raise ConfigError(f"--data.name {name} holds no images", "Try sample:mnist or sample:fashion-mnist.")
    return {ROLE_OF_WORD.get(file.stem, "train"): Part("parquet", (file,)) for file in files}


def _splits(path: Path, key: str) -> dict[Role, Place]:
    """Folders or tables that are called like splits; else all for training."""
    if path.is_dir():
        named = {entry: ROLE_OF_WORD.get(entry.name.lower().split(".")[0]) for entry in _visible(path)}
        groups: dict[Role, list[Path]] = {}
        for entry, role in named.items():
            if role is not None:
                groups.setdefault(role, []).append(entry)
        if "train" in groups:
            for role, entries in groups.items():
                if len(entries) > 1:
                    listed = ", ".join(entry.name for entry in entries)
                    raise DataError(f"{path} has the {role} split twice: {listed}", "Keep one of them.")
            return {role: _place(entries[0], f"{key} ({role})") for role, entries in groups.items()}
    return {"train": _place(path, key)}


def _place(path: Path, key: str) -> Place:
    """The images under a path: a folder of one folder for each class, or tables."""
    if not path.is_dir():
        part = find_part(str(path), key)
        if part.kind == "text":
            raise DataError(f"{key}: {path} holds texts, not images", "Give CSV, TSV, JSONL or Parquet.")
        return part
    classes = {
        entry.name: [file for file in sorted(entry.rglob("*")) if file.suffix.lower() in SUFFIXES]
        for entry in _visible(path)
        if entry.is_dir()
    }
    empty = [name for name, files in classes.items() if not files]
    if any(classes.values()):
        if empty:
            raise DataError(
                f"{key}: the folder of class '{empty[0]}' in {path} has no image",
                f"Remove it, or put images into it: {', '.join(SUFFIXES)}.",
            )
        rows = [(file, name) for name, files in classes.items() for file in files]
        return Photos(tuple(file for file, _ in rows), tuple(name for _, name in rows))
    if any(file.suffix.lower() in SUFFIXES for file in _visible(path)):
        raise DataError(
            f"{key}: {path} holds images without a class", "Put those of each class into a folder called like it."
        )
    return _place_of_tables(path, key)


def _place_of_tables(path: Path, key: str) -> Part:
    try:
        part = find_part(str(path), key)
    except DataError as error:
        raise DataError(
            f"{key}: {error.message}",
            "It needs a folder of images for each class, or CSV, TSV, JSONL or Parquet files.",
        ) from error
    if part.kind == "text":
        raise DataError(f"{key}: {path} holds texts, not images", "Give images, CSV, TSV, JSONL or Parquet.")
    return part


def _content(place: Place) -> list[Any]:
    if isinstance(place, Photos):
        return ["images", list(place.classes), [file_digest(file) for file in place.files]]
    return [place.kind, [file_digest(table) for table in place.files]]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
