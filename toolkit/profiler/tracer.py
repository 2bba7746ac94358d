"""Takes the trace of some steps, and makes its table."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from toolkit.errors import ConfigError
from toolkit.profiler.parts import Event, RankTimes, all_ranks, rank_times
from toolkit.profiler.spans import span
from toolkit.profiler.table import table
from toolkit.world import World

WARM_UP = 3
"""Steps of a process before the first that is traced: memory and caches are filled in them."""


class Profiler:
    """The profile of one process's steps: at most one, of the first `steps` after a warm-up.

    Args:
        steps: how many; None takes no trace.
        world: the ranks.

    Attributes:
        folder: where the trace is to be written.
        tracing: whether a trace is being taken.
    """

    def __init__(self, steps: int | None, world: World) -> None:
        self.folder = Path()
        self.tracing = False
        self._steps = steps or 0
        self._world = world
        self._seen = 0
        self._first = self._traced = 0
        self._profile: Any = None
        self._step: Any = None
        self._batches: list[Any] = []

    @property
    def complete(self) -> bool:
        """Whether all steps that were asked for have been traced, so that `finish` is due."""
        return self.tracing and self._traced == self._steps

    def next_step(self, number: int) -> None:
        """The step before this one has ended."""
        self._close_step()
        self._seen += 1
        if self._steps and self._seen == WARM_UP + 1:
            self._start()
            self._first = number
        if self.tracing:
            self._traced += 1
            self._step = span("step")
            self._step.__enter__()

    def note(self, micro_batches: list[Any]) -> None:
        """What the step computes: its padding is counted after the trace, not in it."""
        if self.tracing:
            self._batches += micro_batches

    def finish(self, *, padding_free: bool, facts: Mapping[str, Any]) -> dict[str, Any]:
        """End the trace and write it; the table for the report, or the `problem` that it was. Collective.

        Args:
            padding_free: the model computes no padding; rows that only fill a micro-batch it does compute.
            facts: settings that the advice depends on, see `table`.
        """
        problem, times = "", RankTimes()
        if path := self.close():
            try:
                times = rank_times(read_trace(path), padding_share(self._batches, padding_free))
            except (OSError, ValueError) as error:
                problem = f"rank {self._world.rank}: {error}"
            problem = problem or ("" if times.exposed else f"rank {self._world.rank}: no step is in {path}")
        else:
            problem = f"rank {self._world.rank} could not write its trace to {self.folder}"
        self._batches, facts = [], {**facts, "padding_free": padding_free}
        reports = self._world.gather((problem, times))
        if problems := [problem for problem, _ in reports if problem]:
            return {"problem": "; ".join(problems)}
        ranks = [times for _, times in reports]
        return {"traces": str(self.folder), "first_step": self._first} | table(ranks, all_ranks(ranks), facts)

    def close(self) -> Path | None:
        """End the trace, whatever is going on, and write what there is of it; its file, or None."""
        if not self.tracing:
            return None
        self._close_step()
        profile, self._profile, self.tracing, self._steps = self._profile, None, False, 0
        path = self.folder / f"rank{self._world.rank}.json.gz"
        unfinished = path.with_name(f".{path.name.removesuffix('.json.gz')}.{os.getpid()}.json.gz")
        try:
            profile.stop()
            path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(unfinished))
            unfinished.replace(path)
        except (OSError, RuntimeError):  # a full disk must not end the run
            with contextlib.suppress(OSError):
                unfinished.unlink()
            return None
        return path

    def drop(self) -> None:
        """End the trace without waiting for anything, and write nothing. One that is still open crashes the exit."""
        if self.tracing:
            self._close_step()
            torch.autograd._disable_profiler()  # type: ignore[attr-defined]
            self._profile, self.tracing, self._steps = None, False, 0

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would greet on the screen of each rank
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.start()
        self.tracing = True

    def _close_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None


def refuse_in_vain(steps: int | None, total_steps: int) -> None:
    """Refuse a trace for which the run is too short."""
    if steps and total_steps <= WARM_UP:
        raise ConfigError(
            f"--run.profile {steps} has no effect on a run of {total_steps} steps: the first {WARM_UP} are not traced",
            "Drop it, or take more steps.",
        )


def padding_share(batches: list[Any], padding_free: bool) -> float:
    """Of the tokens computed for these batches, the share that were padding, or of rows that are but filler."""
    real = computed = 0
    for batch in batches:
        mask = batch.inputs.get("attention_mask")
        if mask is None:
            return 0.0
        real += int(mask[batch.weights.to(mask.device) > 0].sum())
        computed += int(mask.sum()) if padding_free else mask.numel()
    return 1 - real / computed if computed else 0.0


def read_trace(path: Path) -> list[Event]:
    """The events with a duration."""

    def events() -> Iterator[Event]:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for event in json.load(file)["traceEvents"]:
                if event.get("ph") == "X":
                    start, seconds = event["ts"] / 1e6, event["dur"] / 1e6
                    yield Event(event["name"], event.get("cat", ""), str(event["tid"]), start, start + seconds)

    return list(events())
