"""Data that has to be fetched or unpacked first: addresses and archives become files and folders in the cache."""

from __future__ import annotations

import functools
import hashlib
import re
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from datasets.utils import tqdm

from toolkit.data.mapping import quiet
from toolkit.data.prepared import fingerprint, prepared
from toolkit.errors import DataError

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_PINNED = re.compile(r"(https?://[^#]+)(?:#sha256=([0-9a-fA-F]{64}))?")
_PATIENCE = 30.0
"""Seconds in which a server must say something."""
_CHUNK = 1 << 20
_BYTES_FOR_A_BAR = 10_000_000
_LARGEST = 1 << 40
"""Bytes that an archive may hold: one that says more is a bomb, or belongs on a disk of its own."""


def collected(name: str) -> str:
    """The local path of a name: an address is downloaded, an archive unpacked; any other name is given back.

    `https://host/data.csv#sha256=…` is a file; `data.zip` the folder of what is in it; `data.zip/train/*.csv` some of
    it. What was fetched and unpacked stays in the cache, and is found there again.

    Raises:
        DataError: an address without a checksum or with a wrong one, a server that does not answer, an archive that is
            damaged or would write outside of its folder.
    """
    if name.startswith(("http://", "https://")):
        name = str(_download(name))
    archive, inside = _archive_in(name)
    if archive is None:
        return name
    folder = _unpack(archive)
    if not inside:
        # Most archives hold one folder, which is what is meant.
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
        return str(entries[0] if len(entries) == 1 else folder)
    return str(folder / inside)


def _archive_in(name: str) -> tuple[Path | None, str]:
    path = Path(name).expanduser()
    for at, part in enumerate(path.parts):
        candidate = Path(*path.parts[: at + 1])
        if part.lower().endswith(_ARCHIVES) and candidate.is_file():
            return candidate, str(Path(*path.parts[at + 1 :])) if at + 1 < len(path.parts) else ""
    return None, ""


def _download(address: str) -> Path:
    match = _PINNED.fullmatch(address)
    if match is None:
        raise DataError(f"{address} is no address of a file", "Write it as https://host/file.csv#sha256=HASH.")
    url, pin = match[1], (match[2] or "").lower()
    folder = prepared(fingerprint("download", url, pin), _downloaded, functools.partial(_fetch, url, pin))
    (file,) = folder.iterdir()
    if not pin:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        raise DataError(
            f"{url} has no checksum, so that it could change between two runs without a word",
            f"It was fetched and lies at {file}: look at it, and name it as {url}#sha256={found}",
        )
    return file


def _downloaded(folder: Path) -> Path | None:
    return folder if folder.is_dir() and any(folder.iterdir()) else None


def _fetch(url: str, pin: str, result: Path, scratch: Path) -> None:
    target = result / (PurePosixPath(unquote(urlsplit(url).path)).name or "data")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=_PATIENCE) as answer, target.open("wb") as file:
            for chunk in _chunks(answer, target.name):
                digest.update(chunk)
                file.write(chunk)
    except (OSError, ValueError, urllib.error.URLError) as error:  # an address that is none, too
        reason = getattr(error, "reason", None) or error
        raise DataError(f"{url} cannot be fetched: {reason}", "Check the address and the network.") from error
    if pin and digest.hexdigest() != pin:
        raise DataError(
            f"{url} is not the file that was meant: its SHA-256 is {digest.hexdigest()}, not {pin}",
            "It has changed, or the checksum is that of another file.",
        )


def _chunks(answer: Any, name: str) -> Iterator[bytes]:
    size = int(answer.headers.get("Content-Length") or 0)
    done = 0
    with (
        quiet(bars=size >= _BYTES_FOR_A_BAR),
        tqdm(total=size or None, unit="B", unit_scale=True, desc=f"Fetching {name}") as bar,
    ):
        while chunk := answer.read(_CHUNK):
            done += len(chunk)
            bar.update(len(chunk))
            yield chunk
    if size and done != size:
        raise OSError(f"the connection ended after {done:,} of {size:,} bytes")


def _unpack(archive: Path) -> Path:
    try:
        with archive.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{archive} cannot be read: {error.strerror}", "Check its permissions.") from error
    name = fingerprint("unpacked", digest)
    return prepared(name, lambda folder: folder if folder.is_dir() else None, functools.partial(_extract, archive))


def _extract(archive: Path, result: Path, scratch: Path) -> None:
    try:
        if archive.suffix.lower() == ".zip":
            _extract_zip(archive, result)
        else:
            with tarfile.open(archive) as source:
                members = source.getmembers()
                _check_size(archive, sum(member.size for member in members))
                # No links, devices or paths that lead out of the folder.
                source.extractall(result, (m for m in members if m.isfile() or m.isdir()), filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        raise DataError(f"{archive} cannot be unpacked: {error}", "Fetch or write it again.") from error


def _extract_zip(archive: Path, result: Path) -> None:
    with zipfile.ZipFile(archive) as source:
        _check_size(archive, sum(info.file_size for info in source.infolist()))
        for info in source.infolist():
            inside = PurePosixPath(info.filename)
            if inside.is_absolute() or ".." in inside.parts or "\\" in info.filename:
                raise DataError(
                    f"{archive} holds a member that would be unpacked outside of its folder: {info.filename!r}",
                    "Do not use this archive.",
                )
            if info.is_dir():
                continue
            target = result / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            left = info.file_size  # what the archive says: a bomb holds more
            with source.open(info) as packed, target.open("wb") as file:
                while chunk := cast(BinaryIO, packed).read(min(_CHUNK, left + 1)):
                    left -= len(chunk)
                    if left < 0:
                        raise DataError(f"{archive}: {info.filename} is longer than it says", "Do not use it.")
                    file.write(chunk)


def _check_size(archive: Path, size: int) -> None:
    if size > _LARGEST:
        raise DataError(f"{archive} says that it holds {size:,} bytes", "Unpack it yourself, and name the folder.")
