"""A bad wire: frames between two network namespaces, delayed and dropped, as Linux's netem does.

`python wire.py SPACE DEVICE HUB PORT DELAY LOSS ADDRESS`: DEVICE in SPACE and PORT on the bridge of HUB become the ends
of it, in place of the devices of those names. Prints `ready`. Needs root.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import selectors
import struct
import subprocess
import sys
import time
from pathlib import Path

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)


def tap(space: str, name: str) -> int:
    """A new device in a namespace, and the descriptor through which its frames come and go."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{space}", os.O_RDONLY)
    assert LIBC.setns(there, CLONE_NEWNET) == 0
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    assert LIBC.setns(home, CLONE_NEWNET) == 0
    os.close(home)
    os.close(there)
    return descriptor


def ip(space: str, *words: str) -> None:
    subprocess.run(["ip", "-n", space, *words], check=True)


def carry(ends: list[int], delay: float, loss: float) -> None:
    """Until this process is killed."""
    chance, waiting, number = random.Random(0), [], 0
    with selectors.DefaultSelector() as selector:
        for end, other in (ends, ends[::-1]):
            selector.register(end, selectors.EVENT_READ, other)
        while True:
            pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            for key, _ in selector.select(pause):
                frame = os.read(key.fd, 65536)
                number += 1
                if chance.random() >= loss:
                    heapq.heappush(waiting, (time.monotonic() + delay, number, key.data, frame))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, other, frame = heapq.heappop(waiting)
                os.write(other, frame)


def main() -> None:
    space, device, hub, port, delay, loss, address = sys.argv[1:]
    assert Path("/dev/net/tun").exists()
    ip(space, "link", "del", device)  # and with it, its other end
    ends = [tap(space, device), tap(hub, port)]
    ip(hub, "link", "set", port, "master", "bridge", "up")
    ip(space, "address", "add", address, "dev", device)
    ip(space, "link", "set", device, "up")
    print("ready", flush=True)
    carry(ends, float(delay), float(loss))


if __name__ == "__main__":
    main()
