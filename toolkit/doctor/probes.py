"""Checks that may hang (a file system, a name server, a driver, a collective), each in a process that can be left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, TextIO

_ERROR_LINES = 12


class Probe:
    """`python -m MODULE ARGUMENTS`, begun at once, which prints one JSON object a line; later keys join the earlier.

    Args:
        module: to be run.
        arguments: of it.

    Attributes:
        found: all that it has printed so far, as one object.
    """

    def __init__(self, module: str, arguments: Sequence[str] = ()) -> None:
        self.found: dict[str, Any] = {}
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # pipes would have to be read meanwhile
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=self._errors,
            start_new_session=True,  # its own children go with it
        )

    def say(self, value: Any) -> None:
        """A line of JSON to its standard input; one that has ended does not hear it."""
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()

    def wait_for(self, key: str, seconds: float) -> Any:
        """The value under a key as soon as it is there; None where it has ended, or the time is over, without it."""
        end = time.monotonic() + seconds
        while True:
            ended = self._process.poll() is not None
            self._read()
            if key in self.found or ended or time.monotonic() > end:
                return self.found.get(key)
            time.sleep(0.02)

    def finish(self, seconds: float) -> bool:
        """Wait for its end, which is brought about when the time is over; whether it came before that."""
        try:
            self._process.wait(max(0.0, seconds))
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            self._read()
            self.kill()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def complaint(self) -> str:
        """The last lines of its standard error."""
        self._errors.seek(0)
        return "\n".join(self._errors.read().decode(errors="replace").strip().splitlines()[-_ERROR_LINES:])

    def kill(self) -> None:
        """With its children. A process that a broken disk holds goes when the disk lets it: nobody waits for it."""
        if self.running:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self) -> None:
        self._output.seek(0)
        for line in self._output.read().split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):  # what a library has printed
                said = json.loads(line)
                self.found |= said if isinstance(said, dict) else {}


def say(out: TextIO | None = None, /, **values: Any) -> None:
    """The child's side of it: print these for the parent."""
    print(json.dumps(values), file=out, flush=True)


def heard() -> Any:
    """The child's side of `Probe.say`: the next value; None where the parent has left."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None
