"""Wishes to stop: signals, and the death of the launcher. They are noted here, and acted upon between two steps.

Standard library only.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
NOT_FOR_HELPERS = SIGNALS[1:]
LAUNCHER_HAS_ENDED = "the launcher has ended"

SAME_WISH = 2.0
"""Seconds in which signals are one wish: a terminal's Ctrl-C reaches the ranks, and once more through the launcher."""

POLL = 0.5
"""Seconds between two looks at the parent."""


class StopRequest:
    """Whether somebody has asked this process to stop; a context around its steps.

    The first wish is only noted: `reason` tells of it, and the caller ends when it suits him. A signal that comes more
    than `SAME_WISH` seconds after it ends the process at once with 128 + its number, even where the main thread waits
    for other ranks in C code: a thread of its own reads what the C-level handler writes.

    Outside of the main thread, where Python has no signal handlers, nothing is noted, and of SIGHUP after `nohup` as
    little. Processes that are forked in the context ignore the signals, which launchers send to the whole process
    group, but for SIGTERM; those that must outlive that too call `as_helper`.

    Args:
        launched: whether the parent is a launcher, whose death is a wish to stop. A shell is none: what it has started
            in the background may outlive it. The launcher is the parent that this process has when this is made.
    """

    def __init__(self, *, launched: bool = True) -> None:
        self._launched = launched
        self._parent = os.getppid()
        self._reason = ""
        self._since = 0.0
        self._listening = False
        self._leave = contextlib.ExitStack()

    @property
    def reason(self) -> str:
        """Who asked first: the name of a signal, or "the launcher has ended"; empty while nobody has."""
        return self._reason

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave.close()
        self._listening = False

    def _listen(self) -> None:
        reader, writer = socket.socketpair()
        writer.setblocking(False)  # as `set_wakeup_fd` demands
        reader.settimeout(POLL)
        thread = threading.Thread(target=self._watch, args=(reader,), name="stop request", daemon=True)
        thread.start()
        leave = self._leave.callback  # in the reverse order
        leave(reader.close)
        leave(thread.join)
        leave(writer.close)
        leave(signal.set_wakeup_fd, signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False))
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        for number in SIGNALS[:-1] if nohup else SIGNALS:
            # None is a handler that was not installed from Python, and that Python cannot put back.
            leave(signal.signal, number, signal.signal(number, _left_to_the_thread) or signal.SIG_DFL)
        self._listening = True
        _after_fork(weakref.ref(self))

    def _watch(self, reader: socket.socket) -> None:
        while True:
            try:
                numbers = reader.recv(64)
            except TimeoutError:
                if self._launched and os.getppid() != self._parent:
                    self._note(LAUNCHER_HAS_ENDED)
                continue
            if not numbers:  # the other end was closed
                return
            for number in filter(SIGNALS.__contains__, numbers):  # other handlers' signals are written here too
                if self._reason and time.monotonic() - self._since > SAME_WISH:
                    os.write(2, f"a second signal, {signal.Signals(number).name}: ended at once\n".encode())
                    os._exit(128 + number)
                self._note(signal.Signals(number).name)

    def _note(self, reason: str) -> None:
        if not self._reason:
            self._since = time.monotonic()
            self._reason = reason

    def _forget(self) -> None:
        """In a forked child: listen no longer, or its end by SIGTERM would be noted in the parent's name."""
        if self._listening:
            self._listening = False
            self._leave.pop_all()  # uncalled: the thread is not here, and the sockets are the parent's
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _ignore(NOT_FOR_HELPERS)


def as_helper(worker: int = 0) -> None:
    """Make this process, which loads data for a rank, end with the rank and not before.

    For the `worker_init_fn` of torch's DataLoader. A launcher sends its signals to the whole process group; a worker
    that ends by one takes the rank along, which was about to finish its step. Only the parent's SIGTERM counts.
    """
    _ignore(NOT_FOR_HELPERS)
    # Blocked, so that the thread can ask who sent it: handlers in Python are not told.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()  # not the server that has forked this process in its name
    pid = os.getppid() if parent is None else parent.pid
    threading.Thread(target=_end_for_parent, args=(pid,), name="as helper", daemon=True).start()


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """A time in which C code waits for others, and Python's handler would not be called: SIGINT ends the process.

    There is nothing to be saved yet. Without this, a rank would wait for one that Ctrl-C has ended already.
    """
    main = threading.current_thread() is threading.main_thread()
    heard = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_all() -> None:
    """Hear no more wishes: this process is about to end, and its exit code says more than a signal would."""
    _ignore(SIGNALS)


def _ignore(numbers: Sequence[signal.Signals]) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _end_for_parent(parent: int | None) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Stands where the default action would end the process."""


def _after_fork(request: weakref.ref[StopRequest]) -> None:
    """Let forked children forget the request; Python offers no way to take that back, but it holds nothing alive."""

    def forget() -> None:
        stop = request()
        if stop is not None:
            stop._forget()

    os.register_at_fork(after_in_child=forget)
