"""Requests that come in at the same time, answered in one go."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.predict.kinds import Answer, Answerer


class Busy(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class _Job:
    inputs: Sequence[Any]
    answers: Future[list[Answer]] = field(default_factory=Future)


class Batcher:
    """A thread of its own in which the model answers.

    Args:
        answerer: the model.
        batch: inputs of one forward pass, at most.
        wait: seconds that the first of them waits for others.
        room: requests that may wait.

    Attributes:
        counts: `requests` and `inputs` that were answered, `batches` that they were answered in, and `seconds` that
            took.
    """

    def __init__(self, answerer: Answerer, *, batch: int, wait: float, room: int) -> None:
        self.counts = {"requests": 0, "inputs": 0, "batches": 0, "seconds": 0.0}
        self._answerer = answerer
        self._batch = batch
        self._wait = wait
        self._jobs: queue.Queue[_Job | None] = queue.Queue(room)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, inputs: Sequence[Any]) -> Future[list[Answer]]:
        """An answer to each of the inputs, later: a ToolkitError where one of them is at fault.

        Raises:
            Busy: try again later.
        """
        job = _Job(inputs)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Busy from None
        return job.answers

    def close(self) -> None:
        """Answer what waits, and end."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs, ends = [job], time.monotonic() + self._wait
            while sum(len(one.inputs) for one in jobs) < self._batch:
                with suppress(queue.Empty):
                    if (more := self._jobs.get(timeout=max(0.0, ends - time.monotonic()))) is None:
                        self._answer(jobs)
                        return
                    jobs.append(more)
                    continue
                break
            self._answer(jobs)

    def _answer(self, jobs: Sequence[_Job]) -> None:
        inputs, start = [one for job in jobs for one in job.inputs], time.monotonic()
        try:
            found = [answer for window in self._answerer.stream(inputs, batch=self._batch) for answer in window]
        except ToolkitError as error:
            if len(jobs) == 1:
                jobs[0].answers.set_exception(error)
                return
            for job in jobs:  # one of them is at fault, and the others are not to pay for it
                self._answer([job])
            return
        except Exception as error:  # a defect, or memory that is used up: the next request may do better
            for job in jobs:
                job.answers.set_exception(error)
            return
        self.counts["requests"] += len(jobs)
        self.counts["inputs"] += len(inputs)
        self.counts["batches"] += 1
        self.counts["seconds"] += time.monotonic() - start
        for job in jobs:
            job.answers.set_result(found[: len(job.inputs)])
            found = found[len(job.inputs) :]
