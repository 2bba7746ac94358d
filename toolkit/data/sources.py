"""Where labelled texts come from: a sample, files, a folder, a glob, or the hub; and what belongs to which split.

`resolve` finds the files without reading them, `digest` names their content, `read` brings them into one corpus.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, concatenate_datasets

from toolkit import samples
from toolkit.config import TextDataConfig
from toolkit.data.collect import collected
from toolkit.data.files import PLAIN_TEXTS, ROLE_OF_WORD, ROLES, Labelled, Part, Role, kind_of, read_part
from toolkit.data.hub import HubData, find, read_hub
from toolkit.errors import ConfigError, DataError, nearest

_FILES = (".txt", ".gz", ".zip", ".tar", ".tgz", ".bz2", ".xz")
"""Endings of files beside those of tables."""
_SPLIT_NAME = re.compile(rf"({'|'.join(ROLE_OF_WORD)})([-_]\d.*)?")
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """What was found under the names of a config.

    Attributes:
        parts: local files by split; they override the splits of `hub`.
        hub: a data set of the hub, or None.
        warnings: what was left aside.
    """

    parts: Mapping[Role, Part]
    hub: HubData | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """All rows of a source in one numbering: training rows first, then validation, then test.

    Attributes:
        texts: one column, `text`: string or null.
        labels: strings or nulls, as many.
        roles: index into `ROLES` for each row, as given by the source.
        begins: for messages, (first row, name) of each file.
        groups: as the labels, where they were asked for.
    """

    texts: Dataset
    labels: pa.ChunkedArray
    roles: npt.NDArray[np.int8]
    begins: tuple[tuple[int, str], ...]
    groups: pa.ChunkedArray | None = None

    def where(self, row: int) -> str:
        """`row 3 of reviews.csv`, counted from 1 without a header."""
        begin, name = max(entry for entry in self.begins if entry[0] <= row)
        return f"row {row - begin + 1} of {name}"


def resolve(config: TextDataConfig) -> Source:
    """Find the files of every split, or the commit on the hub; read nothing yet.

    Raises:
        ConfigError: an unknown sample, or a revision of something that has none.
        DataError: something is missing, or a folder holds what cannot be told apart.
    """
    name, hub = collected(config.name), None
    parts: dict[Role, Part] = {}
    warnings: list[str] = []
    if not name:
        raise ConfigError("--data.name is empty", "Give a file, a folder, a glob, a hub id or sample:NAME.")
    if config.text == config.label:
        raise ConfigError(
            f"--data.text and --data.label both name the column '{config.text}'", "Name the column of the classes."
        )
    if config.group in (config.text, config.label):
        raise ConfigError(f"--data.group {config.group} is the text or the label too", "Name another column.")
    is_sample = name.startswith("sample:")
    if config.revision is not None and (is_sample or is_local(name)):
        raise ConfigError(
            f"--data.revision {config.revision} cannot take effect: '{name}' is no hub id", "Leave --data.revision out."
        )
    if is_sample:
        parts.update(sample_parts(name))
    elif is_local(name):
        parts.update(_local_splits(name, warnings))
    else:
        hub = find(name, config.revision)
        warnings += [hub.warning] if hub.warning else []
    for role, given in (("validation", config.validation), ("test", config.test)):
        if given is not None:
            if role in parts:
                warnings.append(f"--data.{role} replaces the {role} split that lies in {name}")
            parts[role] = find_part(collected(given), f"--data.{role}")  # type: ignore[index]  # the two names are roles
    return Source(parts, hub, tuple(warnings))


def sample_parts(name: str) -> dict[Role, Part]:
    """The splits that `sample:NAME` comes in; most come in one, of which some is to be held out."""
    folder = samples.fetch(name.removeprefix("sample:"))
    files: dict[Role, Path] = {role: folder / f"{role}.jsonl" for role in ROLES} | {"train": folder / "data.jsonl"}
    return {role: Part("jsonl", (file,)) for role, file in files.items() if file.is_file()}


def digest(source: Source) -> str:
    """SHA-256 (hex) over the content of a source; names and times of files do not enter, save those of classes."""
    content = {
        role: [part.kind, part.classes, [file_digest(file) for file in part.files]]
        for role, part in source.parts.items()
    }
    hub = [source.hub.name, source.hub.commit] if source.hub else None
    return hashlib.sha256(json.dumps([hub, content], sort_keys=True).encode()).hexdigest()


def read(source: Source, text: str, label: str, scratch: Path, group: str | None = None) -> Corpus:
    """Read all rows.

    Args:
        source: as `resolve` found it.
        text: column of the texts.
        label: column of the labels.
        scratch: folder for the Arrow files behind the result.
        group: column of what keeps rows together.

    Raises:
        DataError: a file is malformed, empty, not UTF-8, or lacks a column.
    """
    pieces = sorted(_pieces(source, text, label, scratch, group), key=lambda piece: ROLES.index(piece[0]))
    sizes = [len(found.texts) for _, found in pieces]
    starts = np.cumsum([0, *sizes[:-1]])
    return Corpus(
        texts=concatenate_datasets([found.texts for _, found in pieces]),
        labels=_joined([found.labels for _, found in pieces]),
        roles=np.repeat(np.array([ROLES.index(role) for role, _ in pieces], np.int8), sizes),
        begins=tuple(
            (int(start) + row, name)
            for start, (_, found) in zip(starts, pieces, strict=True)
            for row, name in found.begins
        ),
        groups=None if group is None else _joined([found.groups for _, found in pieces if found.groups is not None]),
    )


def _joined(columns: Iterable[pa.ChunkedArray]) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())


def _pieces(source: Source, text: str, label: str, scratch: Path, group: str | None) -> Iterator[tuple[Role, Labelled]]:
    if source.hub:
        for role, found in read_hub(source.hub, text, label, group):
            if role not in source.parts:
                yield role, found
    for role, part in source.parts.items():
        for found in read_part(part, text, label, scratch, group):
            yield role, found


def file_digest(file: Path) -> str:
    """SHA-256 (hex) over its content."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", "Check its permissions and its disk.") from error


def is_local(name: str) -> bool:
    """Whether a name means a path; a missing one included, as long as it cannot be a hub id."""
    looks_like_file = kind_of(Path(name)) is not None or Path(name).suffix in (*PLAIN_TEXTS, *_FILES)
    return looks_like_file or not _HUB_ID.fullmatch(name) or Path(name).exists()


def _local_splits(name: str, warnings: list[str]) -> dict[Role, Part]:
    folder = Path(name).expanduser()
    if folder.is_dir() and (groups := _split_entries(folder)):
        aside = [path.name for path in _visible(folder) if kind_of(path) and _role_of(path) is None]
        if aside:
            warnings.append(f"{folder}: {', '.join(aside[:5])} left aside, being of no split")
        return {role: _split_part(entries, f"{folder} ({role})") for role, entries in groups.items()}
    return {"train": find_part(name, "--data.name")}


def _split_entries(folder: Path) -> dict[Role, list[Path]]:
    """The entries of a folder that are named after splits; nothing where it is no folder of splits."""
    groups: dict[Role, list[Path]] = {}
    for path in _visible(folder):
        role = _role_of(path)
        if role and (path.is_dir() or kind_of(path)):
            groups.setdefault(role, []).append(path)
    files = [path.name for paths in groups.values() for path in paths if path.is_file()]
    if "train" in groups:
        return groups
    if files:
        raise DataError(
            f"{folder} has {', '.join(files)}, but no training file (train.csv or the like)",
            "Name the training file with --data.name, and the others with --data.validation and --data.test.",
        )
    return {}


def _split_part(entries: list[Path], where: str) -> Part:
    folders = [path for path in entries if path.is_dir()]
    if folders and len(entries) > 1:
        raise DataError(f"{where} is there twice: {', '.join(path.name for path in entries)}", "Keep one of them.")
    return _folder(folders[0]) if folders else _same_kind(entries, where)


def _role_of(path: Path) -> Role | None:
    match = _SPLIT_NAME.fullmatch(path.name.lower().split(".")[0])
    return ROLE_OF_WORD[match[1]] if match else None


def find_parallel(name: str, key: str) -> Part | None:
    """Two text files with a comma between their paths; None for a name that is none such.

    Raises:
        DataError: one of them is not there.
    """
    paths = [Path(path).expanduser() for path in name.split(",")]
    if len(paths) != 2 or Path(name).exists() or not all(path.name for path in paths):
        return None
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(
            f"{key} '{name}': there is no file {missing[0]}", f"Relative names are looked for in {Path.cwd()}."
        )
    return Part("parallel", tuple(paths))


def find_part(name: str, key: str, *, plain: bool = False) -> Part:
    """The files under a path or a glob, all taken for one split.

    Args:
        name: the path or glob.
        key: where the user wrote it.
        plain: the texts need no label; all data files in a folder, and in those inside of it, are taken.

    Raises:
        DataError: there are none, or of several kinds.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder_of_texts(path) if plain else _folder(path)
    if path.exists():
        return _same_kind([path], str(path), plain=plain)
    if glob.has_magic(name):
        # Path.glob takes no absolute pattern.
        found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207
        if files := [match for match in found if match.is_file()]:
            return _same_kind(files, f"{key} '{name}'", plain=plain)
        raise DataError(f"{key}: no file matches '{name}'", f"Relative names are looked for in {Path.cwd()}.")
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise DataError(
        f"{key}: there is no file or folder '{name}'.{nearest(path.name, beside)}",
        f"Relative names are looked for in {Path.cwd()}.",
    )


def _folder(folder: Path) -> Part:
    """A folder of data files of one kind, or of one sub-folder of text files a class."""
    files = [path for path in _visible(folder) if path.is_file() and kind_of(path)]
    classes = {path.name: sorted(path.glob("*.txt")) for path in _visible(folder) if path.is_dir()}
    texts = [(file, name) for name, members in classes.items() for file in members]
    if files and texts:
        raise DataError(
            f"{folder} mixes data files ({files[0].name} …) with folders of text files ({texts[0][1]} …)",
            "Name the files that you mean with a glob.",
        )
    if texts:
        return Part("text", tuple(file for file, _ in texts), tuple(name for _, name in texts))
    if files:
        return _same_kind(files, str(folder))
    there = ", ".join(path.name for path in _visible(folder)[:8]) or "nothing"
    raise DataError(
        f"{folder} has no data files; it has {there}",
        "It needs CSV, TSV, JSONL, JSON or Parquet files, or one folder of .txt files for each class.",
    )


def _folder_of_texts(folder: Path) -> Part:
    """All data files at any depth, but for those that are hidden."""
    inside = (path for path in sorted(folder.rglob("*")) if path.is_file())
    visible = (
        path for path in inside if not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    )
    files = [path for path in visible if kind_of(path, plain=True)]
    if not files:
        raise DataError(f"{folder} has no data files", "It needs .txt, JSONL, CSV, TSV, JSON or Parquet files.")
    return _same_kind(files, str(folder), plain=True)


def _same_kind(files: Iterable[Path], where: str, *, plain: bool = False) -> Part:
    counts = Counter(kind_of(file, plain=plain) for file in files)
    if None in counts:
        odd = next(file for file in files if kind_of(file, plain=plain) is None)
        raise DataError(
            f"{where}: '{odd.name}' is of no kind that can be read",
            "Give CSV, TSV, JSONL, JSON or Parquet (.csv.gz, .tsv.gz, .jsonl.gz, .json.gz too), or "
            + ("text (.txt, .txt.gz)." if plain else "one folder of .txt files for each class."),
        )
    if len(counts) > 1:
        listed = ", ".join(f"{count} × {kind}" for kind, count in counts.most_common())
        raise DataError(f"{where} mixes kinds of files: {listed}", "Name those of one kind with a glob, like '*.csv'.")
    kind = next(iter(counts))
    assert kind is not None
    return Part(kind, tuple(files))


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
