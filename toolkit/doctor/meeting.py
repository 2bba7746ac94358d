"""How nodes meet before anything else works between them: all connect to the first one, and every wait has an end.

What is said is JSON with its length in front. The first node collects what each has to say and gives all of it to
all. One that does not answer in time is left out from then on, and remembered.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LONGEST = 1 << 26
_GREETING = "toolkit doctor 1"
_SPARE = 3.0
"""Seconds in which a node must take in what the first one has heard."""


class NotMet(Exception):
    """This node and the first one have not met, or have lost one another; says why."""


@dataclass(frozen=True)
class Place:
    """Where nodes meet.

    Attributes:
        rank: of this node; 0 is where the others come.
        nodes: how many there should be.
        host: of the first node, as the others know it.
        port: on it.
    """

    rank: int
    nodes: int
    host: str
    port: int

    @property
    def text(self) -> str:
        """As it stands on the command line."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass
class Meeting:
    """The nodes that have met, seen from one of them.

    Attributes:
        place: who this is, and where.
        lines: to the others; from another node than the first there is one alone, to that.
        duplicates: ranks that came more than once, with the addresses.
        lost: ranks that came and fell silent.
        strangers: what the first node heard from those that do not belong here.
        until: the moment of `time.monotonic` until which the others wait for the first node.
    """

    place: Place
    lines: dict[int, socket.socket] = field(default_factory=dict)
    duplicates: dict[int, list[str]] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    strangers: list[str] = field(default_factory=list)
    until: float = math.inf

    @property
    def missing(self) -> list[int]:
        """Ranks that never came; of the first node alone."""
        return [rank for rank in range(1, self.place.nodes) if rank not in self.lines and rank not in self.lost]

    def exchange(self, value: Any, seconds: float) -> dict[int, Any]:
        """What each node says within these seconds, by rank, on all of them.

        Raises:
            NotMet: the first node is gone.
        """
        end = time.monotonic() + seconds
        if self.place.rank:
            line = self.lines[0]
            try:
                _send(line, value, end)
                return {int(rank): said for rank, said in _receive(line, self.until).items()}
            except (OSError, ValueError) as error:
                raise NotMet(f"the first node is silent since: {error or type(error).__name__}") from error
        heard = {0: value}
        for rank, line in list(self.lines.items()):
            try:
                heard[rank] = _receive(line, end)
            except (OSError, ValueError):
                self._drop(rank)
        for rank, line in list(self.lines.items()):
            try:
                _send(line, heard, time.monotonic() + _SPARE)
            except OSError:
                self._drop(rank)
        return heard

    def clock_offsets(self) -> dict[int, tuple[float, float]]:
        """How far the clock of each node is ahead of the first one's, and how uncertain that is, in seconds.

        Called on all nodes; all but the first answer, and get nothing. By Cristian's algorithm: a clock is read
        between the sending of a question and the coming of its answer, and of several times the shortest counts.
        """
        offsets: dict[int, tuple[float, float]] = {}
        if self.place.rank:
            with contextlib.suppress(OSError, ValueError):
                while _receive(self.lines[0], self.until) == "time":
                    _send(self.lines[0], time.time(), time.monotonic() + 1)
            return offsets
        for rank, line in list(self.lines.items()):
            best = math.inf
            try:
                for _ in range(8):
                    asked, began = time.time(), time.monotonic()
                    _send(line, "time", began + 1)
                    answer = float(_receive(line, began + 2))
                    took = time.monotonic() - began
                    if took < best:
                        best = took
                        offsets[rank] = (answer - asked - took / 2, took / 2)
            except (OSError, ValueError):
                self._drop(rank)
        for line in self.lines.values():
            with contextlib.suppress(OSError):
                _send(line, "enough", time.monotonic() + 1)
        return offsets

    def address_of(self, rank: int) -> str:
        """Of another node, as the first one sees it."""
        return str(self.lines[rank].getpeername()[0])

    def close(self) -> None:
        """Hang up; the first node last, so that its port is free at once."""
        if self.place.rank == 0:
            for line in self.lines.values():
                with contextlib.suppress(OSError):
                    line.settimeout(1.0)
                    line.recv(1)
        for line in self.lines.values():
            line.close()

    def _drop(self, rank: int) -> None:
        self.lines.pop(rank).close()
        self.lost.add(rank)


def host_meeting(place: Place, listener: socket.socket, seconds: float) -> Meeting:
    """Wait, as the first node, until all have come or the time is over."""
    meeting = Meeting(place)
    end = time.monotonic() + seconds
    while len(meeting.lines) < place.nodes - 1 and time.monotonic() < end:
        listener.settimeout(max(0.01, end - time.monotonic()))
        try:
            line, (address, *_) = listener.accept()
            hello = _receive(line, min(end, time.monotonic() + 2))
        except (OSError, ValueError):
            continue
        if not isinstance(hello, dict) or hello.get("greeting") != _GREETING:
            line.close()
            continue
        rank, nodes = int(hello["rank"]), int(hello["nodes"])
        fault = ""
        if nodes != place.nodes:
            fault = f"it was started with --nodes {nodes}, and the first node with --nodes {place.nodes}"
            meeting.strangers.append(f"{hello['name']} ({address}): {fault}")
        elif rank in meeting.lines or rank == 0:
            first = place.host if rank == 0 else meeting.address_of(rank)
            meeting.duplicates.setdefault(rank, [first]).append(f"{hello['name']} ({address})")
            fault = f"--rank {rank} is there twice"
        _answer(line, fault)
        if not fault:
            meeting.lines[rank] = line
    return meeting


def join_meeting(place: Place, name: str, seconds: float) -> Meeting:
    """Come to the first node, which may start later than this one.

    Raises:
        NotMet: it is not there, does not answer, or refuses this node.
    """
    end = time.monotonic() + seconds
    reason = "it did not answer"
    while time.monotonic() < end:
        try:
            line = socket.create_connection(
                (place.host, place.port), timeout=max(0.1, min(3.0, end - time.monotonic()))
            )
        except socket.gaierror as error:
            raise NotMet(f"the name {place.host} does not resolve here ({error.strerror})") from error
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
            continue
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hello = {"greeting": _GREETING, "rank": place.rank, "nodes": place.nodes, "name": name}
        try:
            _send(line, hello, time.monotonic() + 2)
            answer = _receive(line, end)
        except (OSError, ValueError):
            line.close()
            reason = "something else than a doctor answers there"
            time.sleep(0.5)
            continue
        if not isinstance(answer, dict) or answer.get("greeting") != _GREETING:
            line.close()
            raise NotMet("something else than a doctor answers there")
        if answer["fault"]:
            line.close()
            raise NotMet(str(answer["fault"]))
        return Meeting(place, {0: line})
    raise NotMet(f"{reason} (tried for {seconds:.0f} s)")


def names_of_job(environment: Mapping[str, str] | None = None) -> list[str]:
    """The nodes of this job by rank, where a scheduler says; as `node[1-3,7]` or `a,b` in SLURM_JOB_NODELIST."""
    names: list[str] = []
    for part in re.findall(r"[^,\[]+(?:\[[^\]]*\])?[^,\[]*", (environment or os.environ).get("SLURM_JOB_NODELIST", "")):
        found = re.fullmatch(r"([^\[]*)\[([\d,-]+)\](.*)", part)
        if found is None:
            names.append(part)
            continue
        for span in found[2].split(","):
            first, _, last = span.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            names += [f"{found[1]}{number:0{len(first)}d}{found[3]}" for number in numbers]
    return names


def _answer(line: socket.socket, fault: str) -> None:
    with contextlib.suppress(OSError):
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _send(line, {"greeting": _GREETING, "fault": fault}, time.monotonic() + 2)


def _send(line: socket.socket, value: Any, end: float) -> None:
    content = json.dumps(value).encode()
    line.settimeout(max(0.01, end - time.monotonic()))
    line.sendall(struct.pack("!I", len(content)) + content)


def _receive(line: socket.socket, end: float) -> Any:
    """The next word. Raises OSError where none comes in time, ValueError where it is none."""
    (size,) = struct.unpack("!I", _bytes(line, 4, end))
    if size > _LONGEST:
        raise ValueError("not a word of this protocol")
    return json.loads(_bytes(line, size, end))


def _bytes(line: socket.socket, size: int, end: float) -> bytes:
    content = bytearray()
    while len(content) < size:
        line.settimeout(min(3600.0, max(0.01, end - time.monotonic())))
        part = line.recv(min(size - len(content), 1 << 16))
        if not part:
            raise ConnectionError("the connection was closed")
        content += part
    return bytes(content)
