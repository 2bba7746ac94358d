"""The manifest of a checkpoint: what stands in its folder, and the proof that it still does.

`manifest.json` names every file with its size and SHA-256; `manifest.json.sha256` holds the digest of the manifest
itself, in the form that `sha256sum --check` reads. A folder is good where nothing is missing, changed or added.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toolkit.folders import sync_folder

FORMAT = 1
MANIFEST = "manifest.json"
DIGEST = f"{MANIFEST}.sha256"

State = Literal["good", "corrupt", "partial", "foreign"]

# These say something of the file. Any other error (no permission, too many open files) says something of the reader,
# and a checkpoint is not damaged because someone cannot read it.
_OF_THE_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EIO})


class Damaged(Exception):
    """A checkpoint is not what was written; the text says in what."""


@dataclass(frozen=True)
class Verdict:
    """What was found in a folder.

    Attributes:
        state: `good`; `corrupt` (damaged after it was written); `partial` (never finished); `foreign` (not ours).
        reason: why it is not good.
        manifest: where it could be read.
    """

    state: State
    reason: str = ""
    manifest: Mapping[str, Any] | None = None


def write_manifest(folder: Path, body: Mapping[str, Any]) -> None:
    """Write the manifest and its digest, flushed to the disk with the folder itself."""
    content = (json.dumps({"format": FORMAT} | dict(body), ensure_ascii=False, indent=1) + "\n").encode()
    write_file(folder / MANIFEST, content)
    write_file(folder / DIGEST, f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode())
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if it is as it was written.

    Raises:
        Damaged: it is not there, not ours, or not as it was written.
        OSError: this process cannot read it, which says nothing of the checkpoint.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise Damaged("not a folder")
    content, digest = _read(folder / MANIFEST), _read(folder / DIGEST)
    if digest != f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode():
        raise Damaged(f"{MANIFEST} is not the file that was written (SHA-256)")
    try:
        body: dict[str, Any] = json.loads(content)
        version = body["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{MANIFEST} is not ours") from error
    if version != FORMAT:
        raise Damaged(f"{MANIFEST} has format {version}; this version reads format {FORMAT}")
    if not isinstance(body.get("files"), dict) or not isinstance(body.get("step"), int):
        raise Damaged(f"{MANIFEST} is not ours")
    return body


def check_files(folder: Path, manifest: Mapping[str, Any], files: Sequence[str] | None = None) -> str:
    """The first thing that is wrong with the files beside the manifest, or an empty text.

    Args:
        folder: of the checkpoint.
        manifest: what `read_manifest` gave.
        files: hash these alone (several readers share the work); all by default.

    Raises:
        OSError: this process cannot read them, which says nothing of the checkpoint.
    """
    expected = manifest["files"]
    present = {path.name for path in folder.iterdir()} - {MANIFEST, DIGEST}
    for name in sorted(present | set(expected)):
        if name not in present:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} does not belong there"
        found = (folder / name).lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"{name} is not a regular file"
        if found.st_size != expected[name]["bytes"]:
            return f"{name} has {found.st_size} bytes of {expected[name]['bytes']}"
    for name in expected if files is None else files:
        try:
            digest = sha256(folder / name)
        except Damaged as error:
            return str(error)
        if digest != expected[name]["sha256"]:
            return f"{name} is not the file that was written (SHA-256)"
    return ""


def inspect(folder: Path, *, hashing: bool = True) -> Verdict:
    """What state a committed folder is in.

    Args:
        folder: `checkpoints/step_…`, or anything else that a user names.
        hashing: read the files, too; without it their names and sizes are compared.
    """
    if folder.is_symlink() or not folder.is_dir():
        return Verdict("foreign", "not a folder")
    ours = re.fullmatch(r"step_\d+", folder.name)
    if not (folder / MANIFEST).exists() and not ours:
        return Verdict("foreign", f"it has no {MANIFEST}")
    manifest = None
    try:
        manifest = read_manifest(folder)
        reason = check_files(folder, manifest, None if hashing else ())
    except (Damaged, OSError) as error:
        reason = str(error)
    return Verdict("corrupt" if reason else "good", reason, manifest)


def sha256(path: Path) -> str:
    """Of a file's content; follows no symbolic link.

    Raises:
        Damaged: it is no file, or the disk does not give its content.
    """
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, *parts: bytes | memoryview) -> tuple[int, str]:
    """Write and flush to the disk; size in bytes and SHA-256.

    Hashing and writing let go of the interpreter's lock and go on side by side.
    """
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file, ThreadPoolExecutor(1) as beside:
            for part in parts:
                beside.submit(digest.update, part)
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which
        raise
    return sum(map(len, parts)), digest.hexdigest()


def _read(path: Path) -> bytes:
    with _opened(path) as file:
        return file.read()


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Follows no link, and does not wait for a writer where there is a pipe."""
    try:
        with io.open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:  # noqa: UP020
            yield file
    except OSError as error:
        if error.errno not in _OF_THE_FILE:
            raise
        raise Damaged(f"{path.name}: {error.strerror}") from error
