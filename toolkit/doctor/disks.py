"""`python -m toolkit.doctor.disks`: free space and speed of folders, and whether a folder is the same on two nodes.

A process of its own, because a file system may hang. It reads {"folders": {name: path}, "leave": token} from standard
input and prints what it finds under `disks`; then one more word: {"find": {"folder": …, "token": …}} looks for what
another node has left (`shared`), anything else or the end removes what this one has left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path
from typing import Any

from toolkit.doctor.findings import Finding, ok
from toolkit.doctor.probes import heard, say

_TRIED = 32 << 20
_PART = 1 << 20
_SECONDS = 2.0
_LEAST, _LITTLE = 1 << 30, 10 << 30
_SLOW = 20e6
_TOKEN = ".doctor-{}"
_PATIENCE = 3.0
"""Seconds in which a shared file system shows what another node has written."""


def main() -> None:
    """Answer what standard input asks."""
    asked = heard()
    left: list[Path] = []
    try:
        disks = {name: look_at(Path(path)) for name, path in asked["folders"].items()}
        if asked.get("leave") and not disks["run folder"].get("error"):
            token = Path(disks["run folder"]["at"]) / _TOKEN.format(asked["leave"])
            token.write_text(asked["leave"], encoding="ascii")
            left.append(token)
        say(disks=disks)
        following = heard()
        if isinstance(following, dict) and "find" in following:
            say(shared=_finds(**following["find"]))
    finally:
        for token in left:
            token.unlink(missing_ok=True)


def look_at(folder: Path) -> dict[str, Any]:
    """Space and speed where a folder is, or would be made.

    Returns:
        `path`; `at`, the nearest folder that exists; `free` bytes; `speed` in bytes a second of a write that reaches
        the disk; `error` where nothing can be written.
    """
    found: dict[str, Any] = {"path": str(folder), "at": str(folder), "free": 0, "speed": 0.0, "error": ""}
    try:
        at = next(place for place in (folder, *folder.parents) if place.is_dir())
        space = os.statvfs(at)
        found |= {"at": str(at), "free": space.f_bavail * space.f_frsize}
        found["speed"] = _speed(at, found["free"])
    except OSError as error:
        found["error"] = error.strerror or str(error)
        found["full"] = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return found


def _speed(folder: Path, free: int) -> float:
    file = folder / _TOKEN.format(f"speed-{os.getpid()}")
    written, part = 0, os.urandom(_PART)
    began = time.monotonic()
    try:
        with file.open("wb", buffering=0) as stream:
            while written < min(_TRIED, max(_PART, free // 4)) and time.monotonic() - began < _SECONDS:
                written += stream.write(part)
                os.fsync(stream.fileno())
        return written / (time.monotonic() - began)
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _finds(folder: str, token: str) -> bool:
    """Whether what another node has left in a folder is there here too; a network file system may take its time."""
    file, end = Path(folder) / _TOKEN.format(token), time.monotonic() + _PATIENCE
    while True:
        with contextlib.suppress(OSError):
            list(Path(folder).iterdir())  # which makes NFS ask again
            if file.read_text(encoding="ascii") == token:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def check_disks(disks: dict[str, Any] | None, node: str) -> list[Finding]:
    """What `look_at` has found; None where it never came back."""
    if disks is None:
        return [
            Finding(
                "error",
                "disk",
                "the file system of the run or the cache folder does not answer",
                node,
                "a rank would hang at its first read or save",
                "Try `ls` on both; mount it again, or name folders elsewhere: --run.dir, TOOLKIT_CACHE.",
            )
        ]
    return [_check_disk(name, found, node) for name, found in disks.items()]


def _check_disk(name: str, found: dict[str, Any], node: str) -> Finding:
    place = f"{name} {found['path']}"
    other = "--run.dir" if name == "run folder" else "TOOLKIT_CACHE"
    space = f"{found['free'] / 2**30:.1f} GiB free"
    if found["error"] and not found.get("full"):
        what = f"{place} cannot be written ({found['error']})"
        return Finding("error", "disk", what, node, "nothing could be saved", f"Name another folder with {other}.")
    if found["error"] or found["free"] < _LEAST:
        return Finding(
            "error",
            "disk",
            f"{place}: the disk is full, {found['free'] / 2**20:,.0f} MiB free",
            node,
            "a checkpoint would not fit, and training stops where it cannot save",
            f"Free space, or name another folder with {other}.",
        )
    if found["free"] < _LITTLE:
        why = "a checkpoint of a large model takes 12 bytes for each parameter, and two are kept"
        return Finding("warning", "disk", f"{place}: {space}", node, why, f"Free space, or use {other}.")
    speed = f"{found['speed'] / 1e6:,.0f} MB/s"
    if found["speed"] < _SLOW:
        why = "saving, or preparing data, will take long"
        what = f"{place} is written at {speed} only"
        return Finding("warning", "disk", what, node, why, f"Use a faster disk: {other}.")
    return ok("disk", f"{place}: {space}, written at {speed}", node)


if __name__ == "__main__":
    main()
