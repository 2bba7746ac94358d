"""Folders that are there whole or not at all, and names that stay inside of theirs."""

from __future__ import annotations

import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from toolkit.errors import CheckpointError

ASIDE = ".writing_"
"""How the names of folders begin that are being written."""

Guard = Callable[[], None]
"""Called before something is published; raises where it must not be."""


def unguarded() -> None:
    """The guard of what no other process can take over."""


@contextmanager
def written_aside(target: Path, guard: Guard = unguarded) -> Iterator[Path]:
    """A new folder beside `target`, which takes its place when the block ends, and goes where it fails.

    A kill leaves the old `target`, the new one or none, and perhaps a hidden folder that the next call removes.

    Args:
        target: written to by one process, or by those of which `guard` lets the newest alone.
        guard: called before the folder takes its place; raises where it must not.

    Raises:
        CheckpointError: there is no room, or no permission to write.
    """
    aside, old = _aside(target), target.with_name(f".replaced_{target.name}")
    try:
        _remove(old)
        aside.mkdir()
        yield aside
        _finish(aside)
        guard()
        if os.path.lexists(target):
            target.rename(old)
        try:
            aside.rename(target)
        except FileNotFoundError:  # a newer writer has taken it away, and what we have moved may be its own
            if os.path.lexists(old):
                old.rename(target)
            raise
        sync_folder(target.parent)
        _remove(old)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target} cannot be written: {error}", "Check the free space and the permissions of its folder."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def file_written_aside(target: Path) -> Iterator[Path]:
    """A new file, in a hidden folder beside `target`; it takes its place when the block ends, and goes where it fails.

    Raises:
        CheckpointError: there is no room, or no permission to write.
    """
    aside = _aside(target)
    try:
        aside.mkdir()
        yield aside / target.name
        _finish(aside)
        (aside / target.name).replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error}", "Check the free space and the permissions of its folder."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def contained(folder: Path, name: object) -> Path:
    """The regular file of this name in `folder`; in a snapshot of the hub's cache, the blob that its link leads to.

    Raises:
        CheckpointError: it is missing, or the name would lead out of the folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{folder} speaks of a file {name!r}, which is no name of a file in it",
            "Do not use this folder unless you know who made it.",
        )
    path = folder / name
    blobs = folder.resolve().parent.parent / "blobs"
    if path.is_symlink() and folder.resolve().parent.name == "snapshots" and path.resolve().parent == blobs:
        path = path.resolve()
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "Copy the folder again, with all that is in it.") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(
            f"{path} is {'a symbolic link' if stat.S_ISLNK(mode) else 'no regular file'}",
            "Put the file itself there (`cp -rL` copies what links point to).",
        )
    return path


def refuse_strays(folder: Path) -> None:
    """Refuse an index of weights that names a file outside of `folder`: transformers would follow it.

    Raises:
        CheckpointError: naming the file; or the index is damaged.
    """
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = set(json.loads(contained(folder, index.name).read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error!r}", "Copy the folder again.") from error
        for name in names:
            contained(folder, name)


def refuse_taken(target: Path) -> None:
    """Refuse to write where something is, or where nothing can be.

    Raises:
        CheckpointError: `target` is a file or a folder that is not empty, or its parent is not there.
    """
    if not target.parent.is_dir():
        raise CheckpointError(f"{target}: there is no folder {target.parent}", "Make it first.")
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"{target} is there already, and is not an empty folder", "Name a new folder, or remove this one."
        )


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk, so that a rename survives a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def run_lock(run: Path) -> FileLock:
    """What a run's processes hold while they write to its folder."""
    return FileLock(run / ".lock")


def remove_asides(folder: Path, name: str = "") -> None:
    """Remove what is written aside in `folder`, or was when a kill came: all of it, or what was to become `name`."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(f"{ASIDE}{name}~" if name else ASIDE) and "~" in path.name:
                _remove(path)


def _aside(target: Path) -> Path:
    """A name that no other process has: whoever was stopped while it wrote, and wakes up, must not write to ours."""
    remove_asides(target.parent, target.name)
    return target.with_name(f"{ASIDE}{target.name}~{uuid.uuid4().hex[:8]}")


def _finish(folder: Path) -> None:
    """Flush all files, readable for whom the folder is: safetensors writes for the owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if not path.is_file():
            continue
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
