"""The checkpoints of one run on the disk: committed in one rename, kept while they are needed, never half there.

A checkpoint is written aside, under a name that no other save will use. Its files and then its folder are flushed, the
folder is renamed to `step_…`, the pointer moves, and only then are older ones removed. What a kill leaves at any
moment is therefore either a folder aside, which is put in quarantine at the next start, or a whole checkpoint. Which
one is the newest is read from the names, so neither a clock nor the pointer can mislead.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from toolkit.checkpoint.manifest import (
    Damaged,
    check_files,
    read_manifest,
    write_file,
    write_manifest,
)
from toolkit.errors import CheckpointError
from toolkit.folders import ASIDE, Guard, sync_folder, unguarded

REMOVING = ".removing_"
POINTER = "latest.json"
QUARANTINE = "quarantine"
QUARANTINE_KEEPS = 3
"""Folders kept there; older ones are removed, or repeated kills would fill the disk."""


class Store:
    """The folder `checkpoints/` of a run. One process writes to it: rank 0, as long as its guard lets it."""

    def __init__(self, run: Path, guard: Guard = unguarded) -> None:
        self.folder = run / "checkpoints"
        self._guard = guard

    def committed(self) -> list[tuple[int, Path]]:
        """Steps and folders that were committed, the newest step first; whether they are good is another question."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _named(path))]
        return sorted(found, reverse=True)

    def unfinished(self) -> list[Path]:
        """What a kill left of saves."""
        return sorted(self.folder.glob(f"{ASIDE}*"))

    def pointer(self) -> int | None:
        """The step that was committed last, by the pointer; None where it is missing or damaged."""
        try:
            return int(json.loads((self.folder / POINTER).read_bytes())["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def aside(self, step: int, attempt: int) -> Path:
        """Where a checkpoint is to be written. An attempt saves a step once, so no name is used twice."""
        return self.folder / f"{ASIDE}step_{step:08d}_attempt_{attempt:04d}"

    def begin(self, aside: Path) -> None:
        """Make the folder aside."""
        self._guard()
        self.folder.mkdir(parents=True, exist_ok=True)
        aside.mkdir()

    def commit(self, aside: Path, step: int, manifest: Mapping[str, Any]) -> Path:
        """Make what was written aside the newest checkpoint."""
        target = self.folder / f"step_{step:08d}"
        if target.exists():
            raise CheckpointError(f"{target} is there already", "Another process writes to this run: stop one of them.")
        if reason := check_files(aside, manifest, ()):
            raise CheckpointError(
                f"{aside}: {reason}", "All ranks must write to one folder, and nobody else may touch what is in it."
            )
        write_manifest(aside, manifest)
        self._guard()
        aside.rename(target)
        sync_folder(self.folder)
        with contextlib.suppress(OSError):  # as a full disk: it is saved all the same, and is found by its name
            self.point_to(step, target)
        return target

    def point_to(self, step: int, path: Path) -> None:
        """Move the pointer."""
        aside = self.folder / f".{POINTER}"
        write_file(aside, (json.dumps({"step": step, "folder": path.name}) + "\n").encode())
        self._guard()
        aside.rename(self.folder / POINTER)
        sync_folder(self.folder)

    def abandon(self, aside: Path) -> None:
        """Remove what was written aside of a save that has failed: a full disk needs the room."""
        shutil.rmtree(aside, ignore_errors=True)

    def retain(self, keep: int, *, best: bool) -> None:
        """Remove committed ones but the newest `keep`, and with `best` the best one.

        Only those count whose manifest, names and sizes of files are sound: reading them would double the time of a
        save. What is not sound is left to `quarantine`, which a start does.
        """
        sound = list(self._sound())
        self._guard()
        kept = {path for _, path, _ in sound[:keep]} | ({_best(sound)} if best else set())
        for _, path, _ in sound:
            if path not in kept:
                self.remove(path)

    def best(self) -> Path | None:
        """The one that the newest knows as the best; where that was not saved, the one with the lowest validation loss.

        Their own losses do not say all: a signal may have put an evaluation off until after the checkpoint.
        """
        return _best(list(self._sound()))

    def remove(self, path: Path) -> None:
        """Remove a folder: out of sight in one rename, then file by file."""
        doomed = self.folder / f"{REMOVING}{path.name.lstrip('.')}_{os.getpid()}"
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def quarantine(self, path: Path, reason: str) -> Path:
        """Move a folder out of the way, with the reason beside it. The last few that came are kept."""
        shelf = self.folder / QUARANTINE
        shelf.mkdir(exist_ok=True)
        held = sorted((int(match[1]), old) for old in shelf.iterdir() if (match := re.match(r"(\d+)_", old.name)))
        number = held[-1][0] + 1 if held else 1
        target = shelf / f"{number:06d}_{path.name.lstrip('.')}"
        path.rename(target)
        with contextlib.suppress(OSError):  # a disk may be full
            Path(f"{target}.txt").write_text(reason + "\n", encoding="utf-8")
        for _, old in (entry for entry in held if entry[0] <= number - QUARANTINE_KEEPS):
            _remove(old)
        return target

    def clean(self) -> list[Path]:
        """At a start: finish removals that were cut short, and put unfinished saves in quarantine; these."""
        for doomed in self.folder.glob(f"{REMOVING}*"):
            shutil.rmtree(doomed, ignore_errors=True)
        moved = []
        for path in self.unfinished():
            with contextlib.suppress(FileNotFoundError):  # whoever writes it is alive, and has just finished it
                moved.append(self.quarantine(path, "a save that was not finished"))
        return moved

    def _sound(self) -> Iterator[tuple[int, Path, dict[str, Any]]]:
        for step, path in self.committed():
            with contextlib.suppress(Damaged):
                manifest = read_manifest(path)
                if not check_files(path, manifest, ()):
                    yield step, path, manifest


def _named(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"step_(\d{8,})", path.name)


def _best(sound: list[tuple[int, Path, dict[str, Any]]]) -> Path | None:
    known = sound[0][2].get("state", {}).get("best_step") if sound else None
    if named := [path for step, path, _ in sound if step == known]:
        return named[0]
    losses = [(manifest["metrics"].get("validation_loss"), step, path) for step, path, manifest in sound]
    finite = [(loss, step, path) for loss, step, path in losses if loss is not None and math.isfinite(loss)]
    return min(finite)[2] if finite else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
