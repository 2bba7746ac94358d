"""Going on: the newest checkpoint that is good, verified by all ranks together, and back into the strategy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.checkpoint.manifest import Damaged, check_files, read_manifest
from toolkit.checkpoint.rng import restore_rng_state
from toolkit.checkpoint.store import Store
from toolkit.checkpoint.tensors import read_tensors
from toolkit.errors import CheckpointError
from toolkit.strategies import Strategy
from toolkit.world import World


@dataclass(frozen=True)
class Checkpoint:
    """A good checkpoint: its folder, and its manifest as it was written."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that it holds."""
        return int(self.manifest["step"])


def newest_good(store: Store, world: World, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint in which every file is what was written; None where there is none. Collective.

    What is unfinished or damaged is put in quarantine, and `warn` hears of each.
    """
    for path in world.on_main(store.clean):
        warn(f"a save that was not finished is in {path}")
    missing = world.on_main(store.pointer)
    while newest := world.on_main(lambda: store.committed()[:1]):
        step, path = newest[0]
        if missing is not None and missing > step:
            warn(f"the checkpoint of step {missing}, which was committed last, is gone")
            missing = None
        manifest, reason = verify_together(path, world)
        if not reason and manifest["step"] != step:
            reason = f"it is of step {manifest['step']}"
        if not reason:
            return Checkpoint(path, manifest)
        moved = world.on_main(lambda path=path, reason=reason: store.quarantine(path, reason))  # type: ignore[misc]
        warn(f"the checkpoint of step {step} is damaged and not used: {reason}. It is in {moved} now")
        missing = None
    if missing is not None:
        warn(f"the checkpoint of step {missing}, which was committed last, is gone, and there is no other")
    return None


def verify_together(path: Path, world: World) -> tuple[Mapping[str, Any], str]:
    """Manifest, and the first thing wrong with the folder or an empty text; each rank hashes its share of the files.

    Raises:
        CheckpointError: a rank cannot read it, which says nothing of the checkpoint; raised on all ranks.
    """

    def manifest_or_reason() -> tuple[dict[str, Any], str]:
        try:
            return read_manifest(path), ""
        except Damaged as error:
            return {}, str(error)
        except OSError as error:
            raise _unreadable(path, f"rank 0: {error}") from error

    manifest, reason = world.on_main(manifest_or_reason)
    if reason:
        return manifest, reason
    share = sorted(manifest["files"])[world.rank :: world.size]
    found = problem = ""
    try:
        found = check_files(path, manifest, share)
    except OSError as error:
        problem = f"rank {world.rank}: {error}"
    reports = world.gather((found, problem))
    if problem := next((problem for _, problem in reports if problem), ""):
        raise _unreadable(path, problem)
    return manifest, next((found for found, _ in reports if found), "")


def _unreadable(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read by {problem}",
        "Put the run where all ranks can read and write it, and give them the right to.",
    )


def restore(checkpoint: Checkpoint, strategy: Strategy, world: World) -> None:
    """Fill the strategy from a good checkpoint, whatever strategy and number of ranks wrote it. Collective.

    Raises:
        CheckpointError: it was written for another model; raised on all ranks.
    """
    shards = strategy.saved()
    for name in [name for name in shards if name.startswith("outer/") and name not in checkpoint.manifest["tensors"]]:
        shards.pop(name).data.zero_()  # the strategy that wrote it keeps no such thing
    try:
        read_tensors(checkpoint.path, shards)
        problem = None
    except CheckpointError as error:
        problem = error
    problems = [error for error in world.gather(problem) if error]
    if problems:
        raise problems[0]
    strategy.loaded()
    strategy.load_scaler_state(checkpoint.manifest["scaler"])
    if checkpoint.manifest["world"]["ranks"] == world.size:
        own = checkpoint.path / f"rank_{world.rank:05d}.json"
        restore_rng_state(json.loads(own.read_text(encoding="utf-8"))["rng"])
