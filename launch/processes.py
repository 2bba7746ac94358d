"""A parent of processes: it passes signals down, takes orphans in, and ends when none of them is left. For Linux.

Elsewhere nobody hands orphans over, and only the child itself is waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""What is passed on."""

SAME_WISH = 2.0
"""Seconds in which signals are one wish, as `toolkit.signals` has it."""

MARGIN = 10.0
"""Seconds beyond the grace in which the child may end its own children itself."""

TICK = 0.1
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of linux/prctl.h


class Parent:
    """Runs commands, one after the other, each until its last descendant has ended; a context around them.

    A signal to this process is passed on to the command. Whatever runs after the grace is killed, and at once after a
    second signal. A command whose parent is killed gets SIGTERM.

    Args:
        grace: seconds between a signal, or the end of the command, and the end of what it started.

    Attributes:
        asked: the signal that came first; 0 while none has come.
        insisted: the signal that came second.
    """

    def __init__(self, grace: float) -> None:
        self.asked = 0
        self.insisted = 0
        self._grace = grace
        self._since = 0.0
        self._deadline = math.inf
        self._child = 0
        self._leave = contextlib.ExitStack()

    def __enter__(self) -> Parent:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._leave.callback(_prctl, PR_SET_CHILD_SUBREAPER, 0)
        for number in SIGNALS:
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            self._leave.callback(signal.signal, number, signal.signal(number, self._pass_on))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave.close()

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Start the command and wait for it and all that it has started; whether it ended with 0."""
        others = children()
        process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C comes here alone, and is passed on once
            preexec_fn=functools.partial(_end_with_parent, os.getpid()),
        )
        self._child = process.pid
        if self.asked:
            _kill({process.pid}, self.asked)  # it came meanwhile
        left_until = math.inf  # of this command: the next one has its own
        while self._child or children() - others:
            for pid, status in _ended():
                if pid == self._child:
                    self._child = 0
                    process.returncode = os.waitstatus_to_exitcode(status)
                    self._end(children() - others)
                    left_until = time.monotonic() + self._grace
            if time.monotonic() > min(self._deadline, left_until):
                _kill(({self._child} if self._child else set()) | (children() - others), signal.SIGKILL)
            time.sleep(TICK)
        return process.returncode == 0

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = number, now
            self._deadline = now + self._grace + MARGIN
            if self._child:
                _kill({self._child}, self.asked)
        elif now - self._since > SAME_WISH:
            self.insisted, self._deadline = number, now

    def _end(self, orphans: set[int]) -> None:
        """Let those end that the child has left: at a signal, if that has killed it before it could pass it on."""
        now = time.monotonic()
        if not self.asked or now - self._since < SAME_WISH:  # later it would be a second one, which ends them at once
            _kill(orphans, self.asked or signal.SIGTERM)


def children() -> set[int]:
    """The processes whose parent is this one."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            after_the_name = file.read_text(errors="replace").rpartition(")")[2].split()
            if int(after_the_name[1]) == os.getpid():
                found.add(int(file.parent.name))
    return found


def _ended() -> Iterator[tuple[int, int]]:
    with contextlib.suppress(ChildProcessError):  # there is none at all
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            yield pid, status


def _kill(processes: set[int], number: int) -> None:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _end_with_parent(parent: int) -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended before that was said
        os._exit(1)


_LIBC = ctypes.CDLL(None)


def _prctl(option: int, value: int) -> None:
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(option, ctypes.c_ulong(value))
