"""The ranks that train together: this one's place and device among them, and what they do in concert.

A `World` exists before the ranks are connected, so that data is prepared and mistakes are found without holding
up a collective; `connect` forms the process group.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from toolkit.environment import ALONE, Launcher, Ranks, cpu_asked_for, store_file
from toolkit.errors import LaunchError, ToolkitError
from toolkit.signals import ended_by_ctrl_c

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)


@dataclass
class World:
    """The ranks that train together, and this one among them.

    Attributes:
        rank, size: of all processes; local_rank, local_size: of those on this node.
        device: the device of this rank; its type is the same on all.
        launcher: what `accelerate launch` asked for.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    launcher: Launcher

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    @property
    def connected(self) -> bool:
        """Whether the process group exists (never for a single process)."""
        return self.size > 1 and dist.is_initialized()

    def connect(self) -> None:
        """Form the process group: gloo on CPU ranks, nccl (with gloo for host data) on GPUs. Idempotent."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed, wherever it is imported, guesses aloud
        if self.size > 1 and not dist.is_initialized():
            try:
                with ended_by_ctrl_c():
                    dist.init_process_group(
                        self._backend, store=self._store(), rank=self.rank, world_size=self.size, timeout=TIMEOUT
                    )
            except (dist.DistError, RuntimeError, ValueError) as error:
                raise LaunchError(
                    f"rank {self.rank} of {self.size} could not meet the others at {Ranks.read().master}: {error}",
                    "Check that every node reaches that address and that all ranks were started; "
                    "`toolkit doctor --nodes N --rank R --rendezvous HOST:PORT` on each of them finds what is wrong.",
                ) from error
        elif Ranks.read().master:
            self.form_group()  # before accelerate, which would form one that cannot carry host data
        # accelerate's state, which its trackers ask for the main process, finds the group already formed.
        PartialState(cpu=self.device.type == "cpu")

    def form_group(self) -> None:
        """A group of this one process, for engines that cannot do without (FSDP2 or DeepSpeed, to offload)."""
        if not dist.is_initialized():
            for name, value in ALONE.items():  # DeepSpeed reads LOCAL_RANK, and the five are whole or not at all
                os.environ.setdefault(name, value)
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(self._backend, store=store, rank=0, world_size=1)

    def close(self) -> None:
        """Leave the process group; the caller has dropped the model."""
        if dist.is_initialized():
            # Without the barrier and the collection, gloo's threads can abort the process at exit.
            dist.barrier()
            gc.collect()
            dist.destroy_process_group()

    def _store(self) -> Any:
        """Where the ranks meet: a file on one node, where no port must be opened; None for the launcher's address."""
        file = store_file()
        if not file:
            return None
        store = dist.FileStore(file, self.size)  # type: ignore[attr-defined]
        store.set_timeout(TIMEOUT)
        return store

    @property
    def _backend(self) -> str:
        return "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all ranks, in place."""
        if self.connected:
            dist.all_reduce(tensor)
        return tensor

    def rows(self, mine: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The rows of all ranks end to end, in the order of the ranks, and the place of the first of one's own.

        Args:
            mine: (any number, …), of a shape and type that are the same on all ranks but for that number.
        """
        if not self.connected:
            return mine, 0
        counts = torch.zeros(self.size, dtype=torch.long, device=mine.device)
        counts[self.rank] = len(mine)
        sizes = self.sum(counts).tolist()
        padded = mine.new_zeros(max(sizes), *mine.shape[1:])
        padded[: len(mine)] = mine
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)]), sum(sizes[: self.rank])

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """The `value` of each rank, on every rank; by all of them over `group` where one is given."""
        if not self.connected:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def on_main(self, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
        """What `action` returns on rank 0, on every rank; told to all of them over `group` where one is given.

        A user's error there is raised alike on all of them. Any other error is raised on rank 0, and the others
        raise a LaunchError that quotes it, so that nobody waits for a rank that has left.
        """
        outcome: list[Any] = [None, None]
        defect: Exception | None = None
        if self.main:
            try:
                outcome[0] = action()
            except ToolkitError as error:
                outcome[1] = error
            except Exception as error:
                outcome[1] = LaunchError(f"rank 0 failed: {type(error).__name__}: {error}", "See what it printed.")
                defect = error
        # By gather: in gloo, the sender of a broadcast may hang where its peer has died.
        outcome = self.gather(outcome, group)[0]
        if outcome[1] is not None:
            raise defect or outcome[1]
        result: T = outcome[0]
        return result

    def same_on_all_ranks(self, what: str, value: Any) -> None:
        """Check that all ranks hold an equal `value` (one that JSON can hold).

        Raises:
            LaunchError: naming the ranks that differ from rank 0.
        """
        # Not pickle: its bytes also depend on which equal parts are one object.
        digests = self.gather(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest())
        differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if differing:
            raise LaunchError(
                f"{what} differs between rank 0 and ranks {differing}",
                "Start every rank with the same code, settings, data and weights; `toolkit doctor` on all nodes tells "
                "what differs.",
            )


def world(environment: Mapping[str, str] | None = None) -> World:
    """This process among the ranks that were started, before they are connected.

    Raises:
        LaunchError: an environment that is incomplete, contradictory, or of several processes that are one.
    """
    launcher, ranks = Launcher.read(environment), Ranks.read(environment)
    device = _device(ranks.local_rank, cpu=cpu_asked_for(environment))
    return World(ranks.rank, ranks.size, ranks.local_rank, ranks.local_size, device, launcher)


def _device(local_rank: int, *, cpu: bool) -> torch.device:
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"LOCAL_RANK={local_rank}, but this node shows {torch.cuda.device_count()} GPUs",
            "Start at most one process for each GPU, or export ACCELERATE_USE_CPU=true for CPU ranks.",
        )
    return torch.device("cuda", local_rank)
