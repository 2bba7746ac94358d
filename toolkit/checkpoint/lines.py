"""Files of one JSON object a line, to which one process appends until it ends or is killed.

A kill can cut the last line short and harm nothing else. So a last line without its line break is passed over; any
other line that is no JSON object was changed by someone, and is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from toolkit.errors import CheckpointError
from toolkit.folders import Guard, sync_folder, unguarded

BLOCK = 1 << 16


def read_lines(path: Path, size: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each line.

    Args:
        path: of the file.
        size: bytes to read; what another process has appended since is left out.

    Raises:
        CheckpointError: the file cannot be read, or a line is no JSON object.
    """
    with reading(path), path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size if size is None else size
        for number, line in enumerate(file, 1):
            line = line[:left]
            left -= len(line)
            if (record := _object(line)) is not None:
                yield number, record
            elif line.endswith(b"\n"):
                raise changed(path, number, "it is not a JSON object")
            if left == 0:
                return


def last_line(path: Path) -> dict[str, Any] | None:
    """The last line that is a JSON object, found from the end of the file; None where there is none."""
    with reading(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start, length = size, BLOCK
        while start > 0:
            start, length = max(0, size - length), length * 8
            file.seek(start)
            lines = file.read(size - start).split(b"\n")
            whole = lines[1:] if start > 0 else lines
            for line in reversed(whole):
                if (record := _object(line)) is not None:
                    return record
    return None


def append(path: Path, record: Mapping[str, Any], guard: Guard = unguarded) -> None:
    """Append a line and flush it to the disk; a last line that was cut short is taken away first.

    Raises:
        CheckpointError: it cannot be written.
        FencedError: of the guard, which is asked when the file is open: what it allows goes to this very file.
    """
    line = (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode(errors="backslashreplace")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            guard()
            _mend(file)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)


def changed(path: Path, number: int, why: str) -> CheckpointError:
    """The error about a line that is not what was written."""
    return CheckpointError(
        f"{path}, line {number}: {why}", "The file was changed after it was written: take it from a backup."
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file where it cannot be read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error})",
            "Name the folder of a run, and see that you may read it.",
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror})", "Free the disk, or choose another folder for the run."
        ) from error


def _mend(file: IO[bytes]) -> None:
    file.seek(0)
    content = file.read()
    end = content.rfind(b"\n") + 1
    if _object(content[end:]) is not None:
        file.write(b"\n")  # nothing but the line break is missing
    else:
        file.truncate(end)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
