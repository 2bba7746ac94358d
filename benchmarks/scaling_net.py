"""Hosts that are none: network namespaces on one bridge, with links of the rate that is asked for.

Everything, the bridge too, lies in namespaces of its own, named by this process; nothing else on the machine is
touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from types import TracebackType

INTERFACE = "eth0"
"""In each host's namespace."""
_SUBNET = "10.77.0"


def unable() -> str:
    """Why hosts cannot be laid out here, with what to do; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root: run this as root, for instance with sudo"
    if missing := [tool for tool in ("ip", "tc", "taskset") if not shutil.which(tool)]:
        return f"{' and '.join(missing)} not found: install iproute2 and util-linux"
    return ""


class Network:
    """Hosts 0 to `size` - 1, which exist as long as the context lasts.

    Args:
        size: number of hosts.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._prefix = f"scaling-{os.getpid()}"
        self._made: list[str] = []

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    # A signal may come between the start of a process and the moment in which its starter knows of it. So whatever is
    # inside ends here.
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    @staticmethod
    def address(host: int) -> str:
        """Of a host, as the others reach it."""
        return f"{_SUBNET}.{host + 1}"

    def inside(self, host: int, core: int) -> list[str]:
        """What goes before a command so that it runs on a host, held to one core. It stays the same process."""
        return ["ip", "netns", "exec", self.space(host), "taskset", "-c", str(core)]

    def shape(self, rate: int | None) -> None:
        """Hold each link to `rate` bits a second, in both directions; None takes the limit away.

        A token bucket: bursts of a hundredth of a second, and a queue for a whole one, so that TCP is slowed by
        waiting.
        """
        for host in range(self.size):
            for space, device in ((self.space(host), INTERFACE), (self.hub, f"port{host}")):
                present = "tbf" in _run("tc", "-n", space, "qdisc", "show", "dev", device, "root")
                if rate is not None:
                    burst, queue = max(rate // 800, 65536), rate // 8
                    limits = ("rate", f"{rate}bit", "burst", str(burst), "limit", str(queue))
                    _run("tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf", *limits)
                elif present:
                    _run("tc", "-n", space, "qdisc", "del", "dev", device, "root")

    @property
    def hub(self) -> str:
        """The namespace of the bridge, on which host 0 hangs at `port0`, and so on."""
        return f"{self._prefix}-hub"

    def space(self, host: int) -> str:
        """The namespace of a host."""
        return f"{self._prefix}-{host}"

    def _make(self) -> None:
        self._add(self.hub)
        _run("ip", "-n", self.hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self.hub, "link", "set", "bridge", "up")
        for host in range(self.size):
            space, port = self.space(host), f"port{host}"
            self._add(space)
            peer = ("peer", "name", INTERFACE, "netns", space)
            _run("ip", "-n", self.hub, "link", "add", port, "type", "veth", *peer)
            _run("ip", "-n", self.hub, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", space, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _run("ip", "-n", space, "link", "set", device, "up")

    def _add(self, space: str) -> None:
        _run("ip", "netns", "add", space)
        self._made.append(space)

    def _remove(self) -> None:
        """With the processes inside; the links go with their namespaces."""
        while self._made:
            space = self._made.pop()
            inside = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False).stdout
            for process in map(int, inside.split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
