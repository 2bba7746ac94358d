"""Results of long preparations: made once for all ranks of a machine, and found again by their fingerprint."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from toolkit import samples
from toolkit.environment import is_main_rank
from toolkit.errors import DataError
from toolkit.look import see

Result = TypeVar("Result")


def fingerprint(*content: Any) -> str:
    """128 bits (hex) over what is fit for JSON: the same on every machine."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def prepared(name: str, load: Callable[[Path], Result | None], prepare: Callable[[Path, Path], None]) -> Result:
    """What `load` finds under a fingerprint; where that is nothing, one process prepares it and the others wait.

    Args:
        name: the fingerprint of everything that the result depends on.
        load: reads a result's folder; None where there is none, or none that is whole.
        prepare: fills an empty folder (first); what it needs on the way goes into another (second).

    Raises:
        DataError: the result cannot be written.
    """
    folder = samples.cache_folder() / "data" / name
    found = load(folder)
    see(name, found is not None)
    if found is None:
        with _alone(folder) as scratch:
            found = load(folder)
            if found is None:
                (scratch / "result").mkdir()
                prepare(scratch / "result", scratch)
                _publish(scratch / "result", folder)
                found = load(folder)
    assert found is not None, f"what was just written to {folder} cannot be read"
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """Hold the lock of a result, with a scratch folder beside it that is gone afterwards."""
    beginning = f".{folder.name}-"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.parent / f".{folder.name}.lock"):
            for left in folder.parent.glob(f"{beginning}*"):
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed at it
            with tempfile.TemporaryDirectory(
                prefix=beginning, dir=folder.parent, ignore_cleanup_errors=True
            ) as scratch:
                yield Path(scratch)
    except OSError as error:
        raise DataError(
            f"the prepared data could not be written to {folder.parent}: {error}",
            "Free space there, or set TOOLKIT_CACHE to a folder that this process may write to.",
        ) from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """The operating system frees it when its holder dies. No time limit: the work may take hours."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        if is_main_rank():
            print("another process is preparing the data; waiting for it …", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _publish(result: Path, folder: Path) -> None:
    """Give a finished result its name; what cannot be read under that name makes way."""
    if folder.exists():
        folder.rename(result.parent / "broken")
    result.rename(folder)
