"""What makes a run survive: its checkpoints, the ledger of what its ranks consumed, and its attempts."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from toolkit.checkpoint.attempts import Attempts
from toolkit.checkpoint.ledger import Ledger, write_plan
from toolkit.checkpoint.restore import Checkpoint, newest_good, restore, verify_together
from toolkit.checkpoint.rng import rng_state
from toolkit.checkpoint.saver import Saver
from toolkit.checkpoint.store import Store
from toolkit.config import CheckpointConfig
from toolkit.data.loader import Loader, Step
from toolkit.errors import CheckpointError
from toolkit.lease import Lease
from toolkit.strategies import Strategy
from toolkit.world import World

LEDGER_CHECKS = 5.0
"""Seconds for which a rank takes an answer about the lease to hold for its ledger, which nobody else writes to."""


class Recovery:
    """The safety net of one run. Every method is called by all ranks alike, unless it says otherwise.

    Args:
        run: its folder.
        lease: of this start.
        strategy: holds the training state; set up.
        world: connected ranks.
        config: how often to save, and what to keep.
        facts: what stands in the manifest of every checkpoint, alike on all ranks.
        warn: shows a warning on rank 0.

    Attributes:
        saved: step of the newest checkpoint that this process has saved or come from; None before the first.
    """

    def __init__(
        self,
        run: Path,
        lease: Lease,
        strategy: Strategy,
        world: World,
        config: CheckpointConfig,
        facts: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self.store = Store(run, lease.check)
        self.saved: int | None = None
        self.attempt = 0
        self._run = run
        self._lease = lease
        self._strategy = strategy
        self._world = world
        self._config = config
        self._warn = warn
        self._attempts = Attempts(run, lease.check)
        self._ledger: Ledger | None = None
        self._saver: Saver | None = None
        layout = world.gather({name: (shard.shape, str(shard.data.dtype)) for name, shard in strategy.saved().items()})
        tensors = {
            name: {"shape": list(shape), "dtype": dtype.removeprefix("torch.")}
            for ranks in layout
            for name, (shape, dtype) in ranks.items()
        }
        effective = strategy.effective()
        self._facts = dict(facts) | {
            "world": {"ranks": world.size} | {key: effective[key] for key in ("strategy", "precision", "device")},
            "tensors": dict(sorted(tensors.items())),
        }
        self._saved_at = time.monotonic()

    def refuse_hopeless(self) -> None:
        """Refuse to start where the last attempts all crashed at the same step.

        Raises:
            CheckpointError: with the step and the last error.
        """

        def check() -> None:
            crashes, step, error = self._attempts.without_progress()
            if crashes >= self._config.crash_limit:
                raise CheckpointError(
                    f"{self._run} has crashed {crashes} times in a row after step {step}"
                    f"{f': {error}' if error else ' (its processes were killed)'}",
                    "Mend the cause first; to try once more, --checkpoint.crash_limit "
                    f"{crashes + 1}. {self._run / 'attempts.jsonl'} lists the attempts.",
                )

        self._world.on_main(check)

    def resume(self) -> Checkpoint | None:
        """Fill the strategy from the newest good checkpoint; None where there is none.

        Raises:
            CheckpointError: it was written for another model, or leaves out the weights of another base.
        """
        found = newest_good(self.store, self._world, self._warn)
        if found:
            if found.manifest.get("base", "") != self._facts.get("base", ""):
                raise CheckpointError(
                    f"{found.path} was written on top of other frozen weights than this run's --model.name has now",
                    "Bring back the model that the run was begun with.",
                )
            restore(found, self._strategy, self._world)
            self.saved = found.step
        return found

    def load_best(self, step: int) -> Checkpoint | None:
        """Fill the strategy from the checkpoint of this step, the best one, if it is not the newest.

        Where it was not saved, because nobody asked for that then, the best of those that were takes its place.
        """
        self.wait()
        path = self.store.folder / f"step_{step:08d}"
        found = self._world.on_main(lambda: path if path.is_dir() else self.store.best())
        if found is None or found.name == f"step_{self.saved:08d}":
            return None
        return self._load(found)

    def begin(self, from_step: int, loader: Loader, facts: Mapping[str, Any]) -> None:
        """A new attempt goes on from that step."""
        self.close()

        def begin() -> int:
            if from_step == 0:
                ids = loader.dataset.with_format("numpy")["id"][:]  # as numbers of Python they would take seconds
                write_plan(self._run, loader.seed, loader.shape.global_batch, ids)
            return self._attempts.begin(from_step, ranks=self._world.size, **facts)

        self.attempt = self._world.on_main(begin)
        guard = functools.partial(self._lease.check, LEDGER_CHECKS)
        self._ledger = Ledger(self._run, self.attempt, self._world.rank, guard)
        if self._saver is None:
            self._saver = Saver(
                self.store,
                self._strategy,
                self._world,
                attempt=self.attempt,
                keep=self._config.keep,
                keep_best=self._config.keep_best,
                asynchronous=self._config.asynchronous,
            )
        self._saver.attempt = self.attempt

    def consumed(self, step: Step) -> None:
        """Enter what this rank has computed in a step."""
        assert self._ledger is not None
        ids = [sample for batch in step.micro_batches for sample in batch.ids]
        self._ledger.write(step.number, step.epoch, step.samples, ids, step.skipped)

    def left_out(self, step: Step, reason: str) -> None:
        """Enter that the samples of a step were left out, and why."""
        assert self._ledger is not None
        ids = [sample for batch in step.micro_batches for sample in batch.ids]
        skipped = [(sample, reason) for sample in ids] + step.skipped
        self._ledger.write(step.number, step.epoch, step.samples, [], skipped)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, by the settings and the clock of this rank."""
        every, minutes = self._config.every, self._config.every_minutes
        by_steps = every is not None and step // every > (self.saved or 0) // every
        return by_steps or (minutes is not None and time.monotonic() - self._saved_at > 60 * minutes)

    @property
    def failed(self) -> bool:
        """Whether the save in flight has failed, as far as this rank knows; `wait` raises it on all ranks."""
        return self._saver is not None and self._saver.failed

    def save(self, step: int, facts: Mapping[str, Any]) -> float:
        """Begin to save the state after `step`; the seconds that training waited.

        Raises:
            CheckpointError, NumericsError: of the save before it, or of this one.
        """
        assert self._saver is not None
        assert self._ledger is not None
        self._ledger.sync()
        manifest = self._facts | {
            "step": step,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempt": self.attempt,
            "scaler": self._strategy.scaler_state(),
        }
        stall = self._saver.save(manifest | dict(facts), {"rng": rng_state()})
        self.saved, self._saved_at = step, time.monotonic()
        return stall

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            CheckpointError, NumericsError: it failed.
        """
        if self._saver is not None:
            self._saver.wait()

    def end(self, status: str, step: int, error: str = "") -> None:
        """Enter how this attempt ended. For rank 0 alone."""
        if self.attempt:
            self._attempts.end(status, step, error)

    def close(self) -> None:
        """Close the ledger of this rank."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def _load(self, path: Path) -> Checkpoint:
        manifest, reason = verify_together(path, self._world)
        if reason:
            raise CheckpointError(
                f"the best checkpoint, {path}, is damaged: {reason}",
                "Run the same command with --checkpoint.keep_best False to finish with the newest weights.",
            )
        found = Checkpoint(path, manifest)
        restore(found, self._strategy, self._world)
        return found
