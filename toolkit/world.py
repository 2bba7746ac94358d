"""Who am I among the ranks: the only reader of RANK and its companions, and of what `accelerate launch` asked for.

A `World` exists before the ranks are connected, so that data is prepared and mistakes are found without holding
up a collective; `connect` forms the process group.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from toolkit.errors import LaunchError, ToolkitError

T = TypeVar("T")

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=30)

START_CPU_RANKS = (
    "`accelerate launch --cpu --num_processes N` and `distributed_type: MULTI_CPU` start one process only. "
    "Start two CPU ranks with `accelerate launch --config_file configs/accelerate/cpu2.yaml …`; "
    "another number with `--num_processes N` after that file."
)


@dataclass(frozen=True)
class Launcher:
    """What `accelerate launch` asked for, read from the environment that it sets.

    Attributes:
        strategy: `fsdp`, `zero1`, `zero2`, `zero3`, or None where it leaves the choice open.
        precision: `bf16` or `fp16`, or None where it leaves the choice open. The launcher's own default, "no",
            cannot be told from a wish for fp32, so it leaves the choice open too.
        options: the launcher's options for that strategy, by the names of the environment.
    """

    strategy: str | None = None
    precision: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def read(environment: Mapping[str, str]) -> Launcher:
        """The wish in `environment`. Raises LaunchError for one that this toolkit cannot fulfil."""
        asked = {key for key in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if _is_true(environment, f"ACCELERATE_USE_{key}")}
        if "MEGATRON_LM" in asked:
            raise LaunchError("the launcher asks for Megatron-LM", "Use --use_fsdp or --use_deepspeed.")
        precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision not in ("no", "bf16", "fp16"):
            raise LaunchError(f"the launcher asks for --mixed_precision {precision}", "Use no, bf16 or fp16.")
        if environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
            raise LaunchError(
                f"the launcher asks for --dynamo_backend {environment['ACCELERATE_DYNAMO_BACKEND']}",
                "Recipes do not compile the model: leave it at no.",
            )
        strategy, prefix = None, None
        if "FSDP" in asked:
            strategy, prefix = "fsdp", "FSDP_"
        if "DEEPSPEED" in asked:
            stage = _zero_stage(environment)
            if stage not in ("1", "2", "3"):
                raise LaunchError(f"the launcher asks for DeepSpeed with --zero_stage {stage}", "Use 1, 2 or 3.")
            strategy, prefix = f"zero{stage}", "ACCELERATE_DEEPSPEED_"
        options = {key: value for key, value in environment.items() if prefix and key.startswith(prefix)}
        if "DEEPSPEED" in asked:
            names = ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING")
            options |= {name: environment[name] for name in names if name in environment}
        return Launcher(strategy, None if precision == "no" else precision, options)


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
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=TIMEOUT)
            except (dist.DistError, RuntimeError, ValueError) as error:
                master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise LaunchError(
                    f"rank {self.rank} of {self.size} could not meet the others at {master}: {error}",
                    "Check that every node reaches that address and that all ranks were started.",
                ) from error
        # accelerate's state, which its trackers ask for the main process, finds the group already formed.
        PartialState(cpu=self.device.type == "cpu")

    def close(self) -> None:
        """Leave the process group; the caller has dropped the model."""
        if self.connected:
            # Without the barrier and the collection, gloo's threads can abort the process at exit.
            dist.barrier()
            gc.collect()
            dist.destroy_process_group()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all ranks, in place."""
        if self.connected:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The `value` of each rank, on every rank."""
        if not self.connected:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, on every rank; an error there is raised alike on all of them."""
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = action()
            except ToolkitError as error:
                outcome[1] = error
        if self.connected:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def same_on_all_ranks(self, what: str, value: Any) -> None:
        """Check that all ranks hold an equal `value`.

        Raises:
            LaunchError: naming the ranks that differ from rank 0.
        """
        digests = self.gather(hashlib.sha256(pickle.dumps(value)).hexdigest())
        differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if differing:
            raise LaunchError(
                f"{what} differs between rank 0 and ranks {differing}",
                "Start every rank with the same code, settings, data and weights.",
            )


def world(environment: Mapping[str, str] | None = None) -> World:
    """This process among the ranks that were started, before they are connected.

    Raises:
        LaunchError: an environment that is incomplete, contradictory, or of several processes that are one.
    """
    env = os.environ if environment is None else environment
    launcher = Launcher.read(env)
    present = [name for name in RENDEZVOUS if env.get(name)]
    if present and len(present) < len(RENDEZVOUS):
        missing = [name for name in RENDEZVOUS if name not in present]
        fact = f"{', '.join(present)} set in the environment, but {', '.join(missing)} not"
        if "ACCELERATE_USE_CPU" in env and set(present) == {"MASTER_ADDR", "MASTER_PORT"}:
            raise LaunchError(f"several processes were asked for and one was started ({fact})", START_CPU_RANKS)
        raise LaunchError(
            fact, "Start with `accelerate launch`, which sets all of them, or unset them."
        )
    if not present:
        return World(0, 1, 0, 1, _device(env, 0), launcher)
    numbers = {name: _number(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise LaunchError(f"RANK={numbers['RANK']} is not below WORLD_SIZE={numbers['WORLD_SIZE']}")
    local_size = _number(env, "LOCAL_WORLD_SIZE") if env.get("LOCAL_WORLD_SIZE") else numbers["WORLD_SIZE"]
    device = _device(env, numbers["LOCAL_RANK"])
    return World(numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], local_size, device, launcher)


def main_process() -> bool:
    """Whether this process speaks for all, read without any check (for errors before a `World` exists)."""
    return os.environ.get("RANK", "0") == "0"


def _zero_stage(env: Mapping[str, str]) -> str:
    path = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if not path:
        return env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    try:
        return str(json.loads(Path(path).read_text(encoding="utf-8"))["zero_optimization"]["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LaunchError(
            f"the launcher's DeepSpeed file {path} names no ZeRO stage: {error}",
            'Give it {"zero_optimization": {"stage": 1, 2 or 3}}.',
        ) from error


def _device(env: Mapping[str, str], local_rank: int) -> torch.device:
    if _is_true(env, "ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"LOCAL_RANK={local_rank}, but this node shows {torch.cuda.device_count()} GPUs",
            "Start at most one process for each GPU, or export ACCELERATE_USE_CPU=true for CPU ranks.",
        )
    return torch.device("cuda", local_rank)


def _number(env: Mapping[str, str], name: str) -> int:
    if not env[name].isdigit():
        raise LaunchError(f"{name}={env[name]!r} is not a number")
    return int(env[name])


def _is_true(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "false").lower() in ("1", "true", "yes")
