"""`python -m toolkit.doctor.collectives`: all-reduce between nodes, as training does it, over gloo and nccl.

A process of its own, because a collective may hang or abort. It says first what torch it has (`torch`, `nccl`,
`devices`), then reads {"rank", "size", "host", "port", "seconds", "skip"} and says `port` (the first one, whose store
the others come to), `gloo` and, where all have GPUs, `nccl`: {"pairs": {"0-1": …}, "all": …}, each measured as
{"latency": seconds of a single number, "bandwidth": bytes a second} or {"error": …}.

Each pair has a group of its own, so that one that fails holds up nobody else. Pairs are measured in rounds in which
each node is in one pair (the circle method of a tournament), so that no two share a node.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from toolkit.doctor.probes import heard, say

_SMALL, _LARGE = 64 << 10, 8 << 20
"""Bytes of the first tensor that is summed, and the most of the one that counts."""
_TARGET = 0.15
"""Seconds that the sum of the large tensor should take."""
_TIMES = 10
_PATIENCE = 8.0


@dataclass(frozen=True)
class _Job:
    rank: int
    size: int
    backend: str
    store: Any
    end: float
    skip: frozenset[str]
    device: torch.device

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def main() -> None:
    """Say what is here, meet the others, measure, and leave."""
    torch.set_num_threads(1)
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if devices else ""  # type: ignore[no-untyped-call]
    say(torch=torch.__version__, nccl=nccl, devices=devices)
    asked = heard()
    if asked is None:
        return
    end = time.monotonic() + asked["seconds"]
    first = asked["rank"] == 0
    patience = timedelta(seconds=min(_PATIENCE, asked["seconds"]))
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            asked["host"], asked["port"], is_master=first, timeout=patience, wait_for_workers=False
        )
    except (dist.DistError, RuntimeError) as error:
        say(gloo={"error": _brief(error)})
        return
    if first:
        say(port=store.port)
    for backend in ["gloo", *(["nccl"] if asked["nccl"] else [])]:
        device = torch.device("cuda", asked["device"]) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            torch.cuda.set_device(device)
        job = _Job(asked["rank"], asked["size"], backend, store, end, frozenset(asked["skip"]), device)
        say(**{backend: _measure(job)})
    if first:
        heard()  # its store must outlive the others
    os._exit(0)  # gloo's threads may abort an ordinary exit


def _measure(job: _Job) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for low, high in rounds_of(job.rank, job.size):
        name = f"{low}-{high}"
        if name not in job.skip and job.left > 1:
            pairs[name] = _timed(job, name, (low, high))
    whole = {}
    if not job.skip and job.left > 1 and all("error" not in pair for pair in pairs.values()):
        whole = _timed(job, "all", tuple(range(job.size)))
    return {"pairs": pairs, "all": whole}


def rounds_of(rank: int, size: int) -> Iterator[tuple[int, int]]:
    """The pairs of one node, in the order in which all play: in each round each node is in one pair at most."""
    seats = size + size % 2
    for turn in range(seats - 1):
        order = [0, *((turn + seat) % (seats - 1) + 1 for seat in range(seats - 1))]
        place = order.index(rank)
        other = order[seats - 1 - place]
        if other < size:
            yield min(rank, other), max(rank, other)


def _timed(job: _Job, name: str, members: tuple[int, ...]) -> dict[str, Any]:
    """The time of sums over these nodes."""
    patience = timedelta(seconds=max(1.0, min(_PATIENCE, job.left)))
    prefix = dist.PrefixStore(f"{job.backend}/{name}", job.store)  # type: ignore[attr-defined]
    try:
        if job.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = patience
            group: Any = dist.ProcessGroupNCCL(prefix, members.index(job.rank), len(members), options)
        else:
            group = dist.ProcessGroupGloo(prefix, members.index(job.rank), len(members), patience)
        latency = statistics.median(_sum(job, group, 1) for _ in range(_TIMES))
        # The same on all: each step is chosen by the slowest of them.
        longest = _slowest(job, group, min(_sum(job, group, _SMALL // 4) for _ in range(2)))
        size = int(min(_LARGE, _SMALL * max(1.0, _TARGET / longest)))
        seconds = min(_sum(job, group, size // 4) for _ in range(1 if longest > _TARGET else 3))
        # What each node sends and receives in a ring: 2 (n-1)/n of the tensor.
        share = 2 * (len(members) - 1) / len(members)
        return {"latency": latency, "bandwidth": size * share / seconds}
    except (dist.DistError, RuntimeError) as error:
        return {"error": _brief(error)}


def _sum(job: _Job, group: Any, numbers: int) -> float:
    tensor = torch.ones(numbers, device=job.device)
    if job.backend == "nccl":
        torch.cuda.synchronize()
    began = time.monotonic()
    group.allreduce([tensor]).wait()
    if job.backend == "nccl":
        torch.cuda.synchronize()
    return time.monotonic() - began


def _slowest(job: _Job, group: Any, seconds: float) -> float:
    tensor = torch.tensor([seconds], device=job.device)
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]  # as its stubs have it
    group.allreduce([tensor], options).wait()
    return float(tensor)


def _brief(error: Exception) -> str:
    """The first line, without the places in the library's source."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[/\S+:\d+\]\s*|\$\d+$", "", line)[:300]


if __name__ == "__main__":
    main()
