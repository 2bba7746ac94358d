"""Saving while training goes on: the state is copied, and a thread of each rank writes, hashes and commits the copy.

The threads talk over a process group of their own, so they never get between the collectives of training. At most one
save is in flight. What goes wrong on one rank is raised on all of them, when the next save begins or `wait` is called.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from toolkit.checkpoint.manifest import write_file
from toolkit.checkpoint.store import Store
from toolkit.checkpoint.tensors import own_share, write_tensors
from toolkit.errors import CheckpointError, NumericsError, ToolkitError
from toolkit.strategies import Strategy
from toolkit.strategies.state import FlatShard
from toolkit.world import World


@dataclass(frozen=True)
class Timing:
    """Where the time of one save went, in seconds: `stall` is what training waited for."""

    stall: float
    total: float


class Saver:
    """Saves the training state of one run. Every method is called by all ranks alike.

    Args:
        store: where to.
        strategy: holds the state.
        world: connected ranks.
        attempt: number of this start of the run.
        keep, keep_best: what `Store.retain` is told.
        asynchronous: False waits for each save, and holds no copy of what is on the CPU.
    """

    def __init__(
        self,
        store: Store,
        strategy: Strategy,
        world: World,
        *,
        attempt: int,
        keep: int,
        keep_best: bool,
        asynchronous: bool,
    ) -> None:
        self.store = store
        self.attempt = attempt
        self.timings: list[Timing] = []
        self._strategy = strategy
        self._world = world
        self._keep, self._keep_best = keep, keep_best
        self._asynchronous = asynchronous
        self._group = dist.new_group(backend="gloo") if world.connected else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        pinned = world.device.type == "cuda"
        shards = strategy.saved()
        # What several ranks hold, one of them copies, checks and writes.
        self._share = own_share(shards, self._group)
        self._copies = {
            name: replace(shards[name], data=torch.empty_like(shards[name].data, device="cpu", pin_memory=pinned))
            for name in self._share
            # Where training waits for the save, what is on the CPU can be written as it lies; so can what is a copy.
            if (asynchronous or pinned) and not shards[name].apart
        }
        self._stage()  # memory that has not been touched is slow the first time
        self._let_go()

    @property
    def failed(self) -> bool:
        """Whether the save in flight has failed, as far as this rank knows; `wait` raises it on all ranks."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, manifest: Mapping[str, Any], rank_state: Mapping[str, Any]) -> float:
        """Copy the state and begin to write it; the seconds that training waited.

        Args:
            manifest: what describes the checkpoint, alike on all ranks: `step`, `metrics` and more.
            rank_state: of this rank alone, JSON-able.

        Raises:
            CheckpointError, NumericsError: of the save before this one, or without `asynchronous` of this one.
        """
        began = time.monotonic()
        self.wait()
        self._stage()
        stall = time.monotonic() - began
        self._thread = threading.Thread(target=self._run, args=(began, stall, dict(manifest), dict(rank_state)))
        self._thread.daemon = True  # where a peer has died, the thread waits for it, and must not hold up the exit
        self._thread.start()
        if not self._asynchronous:
            self.wait()
            stall = time.monotonic() - began
        return stall

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            CheckpointError, NumericsError: it failed, on this rank or on another.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _stage(self) -> None:
        shards = self._strategy.saved()
        if self._copies:
            torch._foreach_copy_(
                [copy.data for copy in self._copies.values()],
                [shards[name].data for name in self._copies],
                non_blocking=True,
            )
        self._staged = {name: self._copies.get(name, shards[name]) for name in self._share}
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()

    def _let_go(self) -> None:
        """Of what the strategy gave out as a copy: it is held for no longer than a save."""
        self._staged = {name: shard for name, shard in self._staged.items() if not shard.apart}

    def _run(self, began: float, stall: float, manifest: dict[str, Any], rank_state: dict[str, Any]) -> None:
        step = manifest["step"]
        try:
            self._save(self.store.aside(step, self.attempt), manifest, rank_state)
            self.timings.append(Timing(stall, time.monotonic() - began))
        except ToolkitError as known:
            self._error = known
        except BaseException as defect:
            self._error = _failed(step, defect)
        finally:
            self._let_go()

    def _save(self, aside: Path, manifest: dict[str, Any], rank_state: dict[str, Any]) -> None:
        world, group, step = self._world, self._group, manifest["step"]
        poisoned = sorted(set().union(*world.gather(_not_finite(self._staged), group)))
        if poisoned:
            raise NumericsError(
                f"at step {step} {len(poisoned)} tensors are not finite ({', '.join(poisoned[:3])} …): not saved",
                "Go on from the checkpoint before it with a lower --optim.lr, or --precision fp32.",
            )
        self._on_main(step, lambda: self._begin(aside))
        reports = world.gather(self._write(aside, rank_state), group)

        def commit() -> None:
            try:
                if problem := next((problem for _, problem in reports if problem), ""):
                    raise _failed(step, problem)
                written = {name: file for files, _ in reports for name, file in files.items()}
                listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(written.items())}
                self.store.commit(aside, step, manifest | {"files": listed})
            except BaseException:
                self.store.abandon(aside)
                raise
            self._retain()

        self._on_main(step, commit)

    def _begin(self, aside: Path) -> None:
        self._retain()  # a kill may have left one too many, and the disk may not hold yet another
        self.store.begin(aside)

    def _retain(self) -> None:
        self.store.retain(self._keep, best=self._keep_best)

    def _write(self, aside: Path, rank_state: Mapping[str, Any]) -> tuple[dict[str, tuple[int, str]], str]:
        """Size and digest of each file that this rank wrote; or what went wrong, so that all ranks hear of it."""
        own = aside / f"rank_{self._world.rank:05d}.json"
        try:
            files = write_tensors(aside, self._staged, self._world.rank)
            return files | {own.name: write_file(own, (json.dumps(rank_state) + "\n").encode())}, ""
        except Exception as error:
            return {}, f"{type(error).__name__} on rank {self._world.rank}: {error}"

    def _on_main(self, step: int, action: Callable[[], None]) -> None:
        """Rank 0 does it; what goes wrong there is raised on all ranks."""
        error = None
        if self._world.main:
            try:
                action()
            except ToolkitError as known:
                error = known
            except Exception as defect:
                error = _failed(step, defect)
        # Not a broadcast: in gloo, its sender may wait forever for a rank that has died.
        told = self._world.gather(error, self._group)[0]
        if told:
            raise error or told


def _failed(step: int, why: BaseException | str) -> CheckpointError:
    text = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
    error = CheckpointError(
        f"the checkpoint of step {step} could not be saved: {text}",
        "The checkpoints before it are untouched: mend the cause and run the same command again.",
    )
    error.__cause__ = why if isinstance(why, BaseException) else None
    return error


def _not_finite(staged: Mapping[str, FlatShard]) -> set[str]:
    return {
        name
        for name, shard in staged.items()
        if shard.data.is_floating_point() and not all(bool(end.isfinite()) for end in torch.aminmax(shard.data))
    }
