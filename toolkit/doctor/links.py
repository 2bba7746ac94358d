"""What lies between two nodes, without any library: whether they reach each other, what is lost and what is late.

Each node answers on a TCP and a UDP port, and asks all others. A connection tells whether a node is reached at all.
Datagrams tell what TCP hides: how many of them a link loses, and how long one takes. Both are too few to fill a link.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import socket
import statistics
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

_CONNECT_SECONDS = 4.0
_ROUNDS, _EVERY, _TAIL = 200, 0.005, 1.0
"""Datagrams to each node, seconds between two, and seconds to wait for the last."""
_MOST = 8000
"""Datagrams to all nodes together."""
_SIZE = 256
_HEAD = struct.Struct("!8sHId")


@dataclass(frozen=True)
class Peer:
    """Another node: its address, and the ports on which it answers."""

    address: str
    tcp: int
    udp: int


class Answering:
    """Answers on two free ports, as long as the context lasts.

    Attributes:
        tcp, udp: the ports.
    """

    def __init__(self, family: socket.AddressFamily = socket.AF_INET) -> None:
        self._listener = socket.create_server(("", 0), family=family, backlog=256)
        self._datagrams = socket.socket(family, socket.SOCK_DGRAM)
        self._datagrams.bind(("", 0))
        self.tcp, self.udp = self._listener.getsockname()[1], self._datagrams.getsockname()[1]
        self._ended = False
        self._thread = threading.Thread(target=self._answer, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended = True
        self._thread.join(2)
        self._listener.close()
        self._datagrams.close()

    def _answer(self) -> None:
        with selectors.DefaultSelector() as selector:
            for either in (self._listener, self._datagrams):
                either.setblocking(False)
                selector.register(either, selectors.EVENT_READ)
            while not self._ended:
                for key, _ in selector.select(0.1):
                    with contextlib.suppress(OSError):
                        if key.fileobj is self._listener:
                            self._listener.accept()[0].close()
                        else:
                            self._datagrams.sendto(*self._datagrams.recvfrom(_SIZE * 2))


def ask_all(peers: Mapping[int, Peer]) -> dict[int, dict[str, Any]]:
    """What lies between this node and each of the others.

    Returns:
        By rank: `reached`; `reason` where it is not; `sent` and `back`, datagrams; `rtt`, the median of their way
        there and back in seconds, None where none came back.
    """
    found: dict[int, dict[str, Any]] = {}
    threads = [
        threading.Thread(target=lambda rank=rank, peer=peer: found.update({rank: _connect(peer)}), daemon=True)
        for rank, peer in peers.items()
    ]
    for thread in threads:
        thread.start()
    sent, times = _send_datagrams(peers)
    for thread in threads:
        thread.join(_CONNECT_SECONDS + 1)
    for rank in peers:
        told = found.setdefault(rank, {"reached": False, "reason": "no answer"})
        median = statistics.median(times[rank]) if times[rank] else None
        told |= {"sent": sent, "back": len(times[rank]), "rtt": median}
    return found


def _connect(peer: Peer) -> dict[str, Any]:
    try:
        socket.create_connection((peer.address, peer.tcp), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return {"reached": False, "reason": error.strerror or str(error)}
    return {"reached": True, "reason": ""}


def _send_datagrams(peers: Mapping[int, Peer]) -> tuple[int, dict[int, list[float]]]:
    """How many were sent to each, and how long each took that came back."""
    times: dict[int, list[float]] = {rank: [] for rank in peers}
    if not peers:
        return 0, times
    rounds = max(50, min(_ROUNDS, _MOST // len(peers)))
    mark = os.urandom(8)
    family = socket.AF_INET6 if ":" in next(iter(peers.values())).address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as line:
        line.bind(("", 0))
        line.setblocking(False)
        began = time.monotonic()
        for number in range(rounds):
            for rank, peer in peers.items():
                content = _HEAD.pack(mark, rank, number, time.monotonic()).ljust(_SIZE, b"\0")
                with contextlib.suppress(OSError):
                    line.sendto(content, (peer.address, peer.udp))
            _collect(line, mark, times, began + (number + 1) * _EVERY)
        end = time.monotonic() + _TAIL
        while time.monotonic() < end and any(len(back) < rounds for back in times.values()):
            _collect(line, mark, times, min(end, time.monotonic() + 0.02))
    return rounds, times


def _collect(line: socket.socket, mark: bytes, times: dict[int, list[float]], until: float) -> None:
    """Take in what has come back until then."""
    while True:
        try:
            content = line.recv(_SIZE * 2)
        except BlockingIOError:
            if not select.select([line], [], [], max(0.0, until - time.monotonic()))[0]:
                return
            continue
        except OSError:  # what a port that nobody listens on sends back
            continue
        said, rank, _, began = _HEAD.unpack_from(content)
        if said == mark and rank in times:
            times[rank].append(time.monotonic() - began)
