"""What a run has in its folder of checkpoints, and in which state. Reads; changes nothing."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from toolkit.checkpoint.manifest import DIGEST, MANIFEST, Damaged, State, Verdict, check_files, read_manifest
from toolkit.checkpoint.store import QUARANTINE, Store
from toolkit.errors import CheckpointError, ConfigError, nearest
from toolkit.folders import ASIDE

Advance = Callable[[int], None]

_READERS = 4
_PART = 4 << 20


@dataclass(frozen=True)
class Item:
    """A folder of a checkpoint.

    Attributes:
        path: of the folder.
        state: `good`, `corrupt` or `partial`.
        reason: why it is not good.
        manifest: where it could be read and has all its parts.
        size: of its files, in bytes.
    """

    path: Path
    state: State
    reason: str
    manifest: Mapping[str, Any] | None
    size: int

    @property
    def step(self) -> int:
        """Optimizer steps, by the folder's name."""
        found = re.search(r"step_(\d+)", self.path.name)
        return int(found[1]) if found else -1


def open_store(run: Path) -> Store:
    """The checkpoints of the run in this folder.

    Raises:
        CheckpointError: there is no such folder, or no run in it.
    """
    run = run.expanduser()
    if not run.is_dir():
        beside = [entry.name for entry in run.parent.iterdir()] if run.parent.is_dir() else []
        what = "is a file, not a folder" if run.exists() else "is not there"
        raise CheckpointError(
            f"the run {run} {what}.{nearest(run.name, beside)}",
            f"Name the folder of a run, like runs/bert_cls/001. Relative names are looked for in {Path.cwd()}.",
        )
    store = Store(run)
    if not store.folder.is_dir() and not (run / "config.yaml").is_file():
        runs = sorted(path.parent.name for path in run.glob("*/config.yaml"))
        inside = run.name == "checkpoints" or (run / MANIFEST).is_file()
        raise CheckpointError(
            f"{run} is no run: it has neither checkpoints/ nor config.yaml",
            f"Name the folder of the run: {run.parent if run.name == 'checkpoints' else run.parent.parent}."
            if inside
            else f"Name one of the runs in it: {', '.join(runs[-8:])}."
            if runs
            else "Name the folder of a run.",
        )
    return store


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is, or was, one checkpoint of ours; a run's has a manifest too, but no digest of it."""
    named = re.fullmatch(r"step_\d+", folder.resolve().name)
    return folder.is_dir() and (named is not None or (folder / DIGEST).is_file())


def find(source: Path, step: int | None, *, command: str) -> list[Path]:
    """The folders of committed checkpoints that a command is to look at, the newest first.

    Args:
        source: the folder of a run, or of one checkpoint.
        step: this one alone.
        command: that asks; errors name it.

    Raises:
        CheckpointError: there is none.
        ConfigError: a step beside the folder of one checkpoint.
    """
    source = source.expanduser()
    if is_checkpoint(source):
        if step is not None:
            raise ConfigError(f"--step {step} has no effect: {source} is one checkpoint", "Drop it, or name the run.")
        return [source]
    store = open_store(source)
    committed = store.committed()
    if not committed:
        raise CheckpointError(
            f"the run {source} has no checkpoint to {command}", f"`toolkit checkpoint ls {source}` lists what it has."
        )
    if step is None:
        return [path for _, path in committed]
    return [path_of(store, step)]


def path_of(store: Store, step: int) -> Path:
    """The folder of this step.

    Raises:
        CheckpointError: it was not committed, or is gone.
    """
    committed = dict(store.committed())
    if step not in committed:
        there = ", ".join(str(known) for known in committed) or "none"
        raise CheckpointError(f"there is no checkpoint of step {step} in {store.folder}", f"Steps there: {there}.")
    return committed[step]


def examine(path: Path, *, deep: bool, advance: Advance = lambda read: None) -> Item:
    """What state a committed folder is in.

    Args:
        path: of the folder.
        deep: read every file and compare its SHA-256; otherwise names and sizes.
        advance: called with the numbers of bytes that were read.

    Raises:
        CheckpointError: this user cannot read it, which says nothing of the checkpoint.
    """
    try:
        verdict = _verdict(path, deep, advance)
    except FileNotFoundError:
        verdict = Verdict("corrupt", "it was removed while it was read")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "Check its permissions and its disk.") from error
    return Item(path, verdict.state, verdict.reason, verdict.manifest, size_of(path))


def committed(store: Store, *, deep: bool = False, advance: Advance = lambda read: None) -> list[Item]:
    """All that were committed, the newest first; without those that a run which goes on removes meanwhile."""
    items = [examine(path, deep=deep, advance=advance) for _, path in store.committed()]
    return [item for item in items if item.path.is_dir()]


def best_of(items: Iterable[Item]) -> Item | None:
    """The good one with the lowest validation loss, the earlier where two are equal."""
    losses = []
    for item in items:
        loss = item.manifest["metrics"].get("validation_loss") if item.manifest and item.state == "good" else None
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            losses.append((loss, item.step, item))
    return min(losses, key=lambda entry: entry[:2])[2] if losses else None


def unfinished(store: Store) -> list[Item]:
    """Saves that go on, or that a kill has cut short."""
    reason = "a save that goes on, or was cut short"
    return [Item(path, "partial", reason, None, size_of(path)) for path in store.unfinished()]


def in_quarantine(store: Store) -> list[Item]:
    """What was put out of the way, with the reason."""
    return list(_in_quarantine(store.folder / QUARANTINE))


def size_of(path: Path) -> int:
    """Bytes of the files in a folder."""
    total = 0
    with suppress(OSError):
        for entry in path.iterdir():
            with suppress(OSError):
                total += entry.lstat().st_size
    return total


def _verdict(path: Path, deep: bool, advance: Advance) -> Verdict:
    try:
        manifest = read_manifest(path)
    except Damaged as error:
        return Verdict("corrupt", str(error))
    if reason := _malformed(path, manifest):
        return Verdict("corrupt", f"{MANIFEST} is not ours: {reason}")
    reason = check_files(path, manifest, ()) or (_first_changed(path, manifest["files"], advance) if deep else "")
    return Verdict("corrupt" if reason else "good", reason, manifest)


def _malformed(path: Path, manifest: Mapping[str, Any]) -> str:
    """What is wrong with a manifest whose digest is right, as one that was made by hand may be."""
    files, tensors = manifest.get("files"), manifest.get("tensors")
    if not isinstance(files, dict) or not all(_is_file(name, facts) for name, facts in files.items()):
        return "files"
    if not isinstance(tensors, dict) or not all(_is_tensor(facts) for facts in tensors.values()):
        return "tensors"
    for key in ("world", "metrics"):
        if not isinstance(manifest.get(key), dict):
            return key
    named, step = re.fullmatch(r"step_(\d+)", path.name), manifest.get("step")
    if not _is_count(step) or (named and int(named[1]) != step):
        return f"it is of step {str(step)[:20]}"
    return ""


def _is_file(name: str, facts: Any) -> bool:
    plain = name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
    return plain and isinstance(facts, dict) and _is_count(facts.get("bytes")) and isinstance(facts.get("sha256"), str)


def _is_tensor(facts: Any) -> bool:
    if not isinstance(facts, dict) or not isinstance(facts.get("dtype"), str):
        return False
    return isinstance(facts.get("shape"), list) and all(map(_is_count, facts["shape"]))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _first_changed(folder: Path, files: Mapping[str, Any], advance: Advance) -> str:
    """The first file, by name, whose content is not what was written."""

    stopped = Event()

    def check(name: str) -> str:
        digest = hashlib.sha256()
        try:
            with os.fdopen(os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                while not stopped.is_set() and (part := file.read(_PART)):
                    digest.update(part)
                    advance(len(part))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return f"{name} cannot be read ({error.strerror})"
        same = digest.hexdigest() == files[name]["sha256"]
        return "" if same else f"{name} is not the file that was written (SHA-256)"

    with ThreadPoolExecutor(_READERS) as readers:  # hashing lets go of the interpreter's lock
        try:
            return next(filter(None, readers.map(check, sorted(files))), "")
        finally:
            stopped.set()  # after Ctrl-C, too


def _in_quarantine(shelf: Path) -> Iterator[Item]:
    if shelf.is_symlink() or not shelf.is_dir():
        return
    for path in sorted(shelf.iterdir()):
        if path.is_dir() and not path.is_symlink():
            reason = ""
            with suppress(OSError):
                reason = Path(f"{path}.txt").read_text(encoding="utf-8", errors="replace").strip()
            state: State = "partial" if ASIDE.lstrip(".") in path.name else "corrupt"
            yield Item(path, state, reason or "nobody noted why", None, size_of(path))
