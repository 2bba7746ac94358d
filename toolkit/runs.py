"""Which folder a command line means: a new run, one to go on with, or one that is finished.

Every rank comes to the same answer by itself, before anything is loaded; nothing is written here but by `open_folder`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from toolkit.checkpoint.attempts import Attempts
from toolkit.config import CheckpointConfig, RunConfig, plain
from toolkit.errors import CheckpointError, ConfigError, DataError, LaunchError, ToolkitError, nearest
from toolkit.folders import run_lock
from toolkit.report import RunFolder, redact
from toolkit.world import World

FREE = (
    *("checkpoint", "run.dir", "run.name", "run.log_every", "run.trackers", "run.debug", "run.hang_seconds"),
    *("run.profile", "run.show"),
    *("data.workers", "data.tokenize_processes", "data.max_bad_rows"),
)
"""Keys and sections that change nothing in what a run computes: they may always differ."""
SAFE = (
    *("strategy", "precision", "optim", "train.micro_batch", "train.eval_batch", "train.steps", "train.epochs"),
    *("train.max_grad_norm", "train.label_smoothing", "train.padding_free", "train.compile"),
    "train.activation_checkpointing",
    *("train.on_fault", "train.spike", "train.max_rewinds"),
    *("run.eval_every", "run.early_stopping"),
)
"""Keys and sections with which a run can go on in another way, where `--checkpoint.allow_change` says so."""

OF_THE_JOB = "slurm"
"""What `python -m launch slurm` has put into a run's folder before the run begins: its script and its output."""

LOCK_SECONDS = 30
"""How long to wait for the run's former process to end: a launcher restarts at once."""


class Finished(Exception):
    """The run that this command line means is finished: there is nothing to do."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


@dataclass(frozen=True)
class Run:
    """Where a run's folder is, and what differs from the settings it was begun with.

    Attributes:
        path: None for the next free number.
        known: whether the folder holds a run to go on with.
        changes: of keys that were allowed to: the value there, and the one now.
    """

    path: Path | None
    known: bool = False
    changes: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def find_run(recipe: str, config: Any) -> Run:
    """The run that a recipe's settings mean.

    Raises:
        Finished: it is finished.
        CheckpointError: the folder holds another run or other files, or there is nothing to resume.
        ConfigError: an `allow_change` that is unknown or not safe.
    """
    run: RunConfig = config.run
    checkpoint: CheckpointConfig = config.checkpoint
    if run.dir and run.name:
        raise ConfigError("--run.name has no effect beside --run.dir", "Drop one of the two.")
    if run.name and not re.fullmatch(r"[^/\\\0]*[^/\\\0.][^/\\\0]*", run.name):
        raise ConfigError(f"--run.name {run.name} is not the name of a folder", "Use --run.dir for a path.")
    _check_allowed(checkpoint.allow_change, config)
    asked = run.dir or (Path("runs") / recipe / run.name if run.name else None)
    found = _named(asked, config) if asked else _unnamed(Path("runs") / recipe, config)
    if checkpoint.resume == "must" and not found.known:
        raise CheckpointError(
            f"there is no run to go on with in {asked or Path('runs') / recipe}", "Drop --checkpoint.resume must."
        )
    if found.known and found.path and not found.changes and _is_finished(found.path):
        raise Finished(found.path)
    return found


def open_folder(recipe: str, run: Run) -> Path:
    """Make the folder of a new run, or give that of the known one. Called by one rank."""
    parent = Path("runs") / recipe
    try:
        (run.path or parent).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the folder {run.path or parent} cannot be made: {error.strerror}", "Name another with --run.dir."
        ) from error
    if run.path is not None:
        return run.path
    number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            folder = parent / f"{number:03d}"
            folder.mkdir()
            return folder


def lock(folder: Path) -> FileLock:
    """Hold the run's folder until this process ends, however it ends.

    Raises:
        LaunchError: another process does.
    """
    held = run_lock(folder)
    try:
        held.acquire(timeout=LOCK_SECONDS, poll_interval=0.2)
    except Timeout as error:
        raise LaunchError(
            f"another process is writing to {folder}", "Let it end, or name another folder with --run.dir."
        ) from error
    return held


def check_shared(path: Path, world: World) -> None:
    """Check that every rank sees the folder that rank 0 has made. Collective.

    Raises:
        LaunchError: naming the ranks that do not.
    """
    blind = [rank for rank, sees in enumerate(world.gather(path.is_dir())) if not sees]
    if blind:
        raise LaunchError(
            f"ranks {blind} do not see {path.resolve()}, which rank 0 has made",
            "Name a folder on a file system that all nodes share with --run.dir.",
        )


def refuse_begun(folder: RunFolder) -> None:
    """Refuse to begin a run where another process has, while this one waited for the lock.

    Raises:
        LaunchError: it has.
    """
    if folder.config_path.exists():
        raise LaunchError(
            f"another process has begun a run in {folder.path} meanwhile", "The same command now goes on with it."
        )


def refuse_other_data(folder: RunFolder, data_fingerprint: str) -> None:
    """Refuse to go on with a run on other data than it was begun with; where it wrote no manifest, nothing is known.

    Raises:
        DataError: they differ.
    """
    if not folder.manifest_path.exists():
        return
    if folder.read_manifest().get("data_fingerprint") != data_fingerprint:
        raise DataError(
            f"the data are no longer those that {folder.path} was begun with",
            "Bring them back, or start a new run: --checkpoint.resume never, or another --run.dir.",
        )


def _named(path: Path, config: Any) -> Run:
    if not path.exists():
        return Run(path)
    if not path.is_dir():
        raise CheckpointError(f"--run.dir {path} is a file", "Name a folder.")
    # The lock, a lease, a file that was not finished; and the script of the job that this is.
    if all(entry.name.startswith(".") or entry.name == OF_THE_JOB for entry in path.iterdir()):
        return Run(path)
    folder = RunFolder(path)
    if not folder.config_path.exists():
        raise CheckpointError(f"{path} holds other files, and no run", "Name a new folder with --run.dir.")
    if config.checkpoint.resume == "never":
        raise CheckpointError(
            f"{path} holds a run, and --checkpoint.resume is never", "Name a new folder, or remove this one."
        )
    changes = _changes(folder, config)
    refused = {key: pair for key, pair in changes.items() if not _within(key, config.checkpoint.allow_change)}
    if refused:
        lines = "\n".join(f"    {key}: {old} there, {new} now" for key, (old, new) in refused.items())
        safe = [key for key in refused if _within(key, SAFE)]
        allow = f" To go on all the same: --checkpoint.allow_change {' '.join(safe)}." if safe == [*refused] else ""
        raise CheckpointError(
            f"{path} holds a run with other settings:\n{lines}",
            f"Use the same settings, or name a new folder with --run.dir.{allow}",
        )
    return Run(path, True, changes)


def _unnamed(parent: Path, config: Any) -> Run:
    """The newest numbered run with these settings."""
    if config.checkpoint.resume == "never" or not parent.is_dir():
        return Run(None)
    numbered = sorted((p for p in parent.iterdir() if p.name.isdigit()), key=lambda p: int(p.name), reverse=True)
    for path in numbered:
        folder = RunFolder(path)
        with contextlib.suppress(ToolkitError):  # what cannot be read is no run to go on with
            changes = _changes(folder, config)
            if all(_within(key, config.checkpoint.allow_change) for key in changes):
                return Run(path, True, changes)
    return Run(None)


def _changes(folder: RunFolder, config: Any) -> dict[str, tuple[Any, Any]]:
    default = plain(type(config)())
    try:
        there = yaml.safe_load(folder.read_config())
    except yaml.YAMLError as error:
        raise CheckpointError(f"{folder.config_path} is damaged: {error}", "Take it from a backup.") from error
    # A key that is younger than the run has had its default.
    old = dict(_flat(default)) | dict(_flat(there if isinstance(there, dict) else {}))
    new = dict(_flat(redact(plain(config))))
    return {key: (old.get(key), new[key]) for key in new if old.get(key) != new[key] and not _within(key, FREE)}


def _check_allowed(keys: Sequence[str], config: Any) -> None:
    known = dict(_flat(plain(config)))
    sections = {key.rpartition(".")[0] for key in known} - {""}
    for key in keys:
        if key not in known and key not in sections:
            raise ConfigError(
                f"--checkpoint.allow_change {key}: there is no such key.{nearest(key, [*known, *sections])}",
                "Name keys as they stand in --help, as train.steps.",
            )
        if not _within(key, SAFE + FREE):
            raise ConfigError(
                f"--checkpoint.allow_change {key}: with another {key} it would be another run",
                f"Start a new one. What may change: {', '.join(SAFE)}.",
            )


def _within(key: str, allowed: Sequence[str]) -> bool:
    return any(key == entry or key.startswith(f"{entry}.") for entry in allowed)


def _is_finished(path: Path) -> bool:
    """By its report, unless it was to go on after that and was killed."""
    try:
        last = Attempts(path).read()[-1:]
        return RunFolder(path).read_report().get("status") == "finished" and all(a.status == "finished" for a in last)
    except CheckpointError:
        return False


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
