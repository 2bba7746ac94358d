"""What the launcher says: the only reader of RANK and its companions, and of what `accelerate launch` asked for.

Standard library only, so that what must not wait for torch (samples, progress bars) can ask who it is too.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.errors import LaunchError

Environment = Mapping[str, str]

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ALONE = dict(zip(RENDEZVOUS, ("0", "1", "0", "127.0.0.1", "0"), strict=True))
"""What a launcher would set for one process."""

START_CPU_RANKS = (
    "`accelerate launch --cpu --num_processes N` and `distributed_type: MULTI_CPU` start one process only. "
    "Start two CPU ranks with `accelerate launch --config_file configs/accelerate/cpu2.yaml …`; "
    "another number with `--num_processes N` after that file."
)


@dataclass(frozen=True)
class Ranks:
    """The numbers of this process among those that were started.

    Attributes:
        rank, size: of all processes; local_rank, local_size: of those on this node.
        master: address and port where they meet; empty for a process that was started alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master: str = ""

    @staticmethod
    def read(environment: Environment | None = None) -> Ranks:
        """The numbers in `environment`, this process's own by default.

        Raises:
            LaunchError: an environment that is incomplete, contradictory, or of several processes that are one.
        """
        env = _own(environment)
        present = [name for name in RENDEZVOUS if env.get(name)]
        if not present:
            return Ranks()
        if len(present) < len(RENDEZVOUS):
            missing = [name for name in RENDEZVOUS if name not in present]
            fact = f"{', '.join(present)} set in the environment, but {', '.join(missing)} not"
            if "ACCELERATE_USE_CPU" in env and present == ["MASTER_ADDR", "MASTER_PORT"]:
                raise LaunchError(f"several processes were asked for and one was started ({fact})", START_CPU_RANKS)
            raise LaunchError(fact, "Start with `accelerate launch`, which sets all of them, or unset them.")
        rank, size, local_rank, port = (_number(env, name) for name in RENDEZVOUS if name != "MASTER_ADDR")
        local_size = _number(env, "LOCAL_WORLD_SIZE") if env.get("LOCAL_WORLD_SIZE") else size
        for name, number, limit_name, limit in (
            ("RANK", rank, "WORLD_SIZE", size),
            ("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size),
        ):
            if number >= limit:
                raise LaunchError(
                    f"{name}={number} is not below {limit_name}={limit}",
                    "Start with `accelerate launch`, which sets both.",
                )
        return Ranks(rank, size, local_rank, local_size, f"{env['MASTER_ADDR']}:{port}")


@dataclass(frozen=True)
class Job:
    """The job of a scheduler that this process belongs to.

    Attributes:
        id: SLURM's number of it; empty outside of a job.
        start: how often it was queued again before this start.
    """

    id: str = ""
    start: int = 0

    @staticmethod
    def read(environment: Environment | None = None) -> Job:
        """The job in `environment`, this process's own by default."""
        env = _own(environment)
        start = env.get("SLURM_RESTART_COUNT", "")
        return Job(env.get("SLURM_JOB_ID", ""), int(start) if start.isdecimal() else 0)


@dataclass(frozen=True)
class Launcher:
    """What `accelerate launch` asked for, read from the environment that it sets.

    Attributes:
        strategy: `fsdp`, `zero1`, `zero2`, `zero3`, or None where it leaves the choice open.
        precision: `bf16`, `fp16` or `fp8`, or None where it leaves the choice open. The launcher's own default, "no",
            cannot be told from a wish for fp32, so it leaves the choice open too.
        options: the launcher's options for that strategy, by the names of the environment.
    """

    strategy: str | None = None
    precision: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def read(environment: Environment | None = None) -> Launcher:
        """The wish in `environment`, this process's own by default.

        Raises:
            LaunchError: a wish that this toolkit cannot fulfil.
        """
        env = _own(environment)
        _refuse_what_recipes_do_not_do(env)
        precision = env.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision not in ("no", "bf16", "fp16", "fp8"):
            raise LaunchError(f"the launcher asks for --mixed_precision {precision}", "Use no, bf16, fp16 or fp8.")
        strategy, options = None, {}
        if _is_true(env, "ACCELERATE_USE_FSDP"):
            strategy = "fsdp"
            options = {name: value for name, value in env.items() if name.startswith("FSDP_")}
        if _is_true(env, "ACCELERATE_USE_DEEPSPEED"):
            strategy = f"zero{_zero_stage(env)}"
            names = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_GRADIENT_")
            options = {name: value for name, value in env.items() if name.startswith(names)}
        return Launcher(strategy, None if precision == "no" else precision, options)


def cpu_asked_for(environment: Environment | None = None) -> bool:
    """Whether CPU ranks are wanted where there are GPUs too."""
    return _is_true(_own(environment), "ACCELERATE_USE_CPU")


def launched(environment: Environment | None = None) -> bool:
    """Whether a launcher started this process, and answers for it; without one, nobody's end is its own."""
    env = _own(environment)
    return bool(env.get("RANK") or env.get("ACCELERATE_MIXED_PRECISION"))


def is_main_rank(environment: Environment | None = None) -> bool:
    """Whether this process speaks for all: rank 0, or no rank at all. Read without any check."""
    return rank_name(environment) == "0"


def rank_name(environment: Environment | None = None) -> str:
    """The rank as it stands in the environment, for messages before anything is checked."""
    return _own(environment).get("RANK") or "0"


def store_file(environment: Environment | None = None) -> str:
    """The file by which `python -m launch run` lets the ranks of one node meet; empty where they meet at an address."""
    return _own(environment).get("TOOLKIT_STORE", "")


def report_exit_code(code: int) -> None:
    """Leave the exit code of this rank where `python -m launch run` looks for it: `accelerate launch` makes it 1."""
    folder = os.environ.get("TOOLKIT_EXIT_CODES")
    if folder:
        with contextlib.suppress(OSError):  # it must not hide what the rank ends with
            (Path(folder) / rank_name()).write_text(str(code), encoding="ascii")


def _refuse_what_recipes_do_not_do(env: Environment) -> None:
    if _is_true(env, "ACCELERATE_USE_MEGATRON_LM"):
        raise LaunchError("the launcher asks for Megatron-LM", "Use --use_fsdp or --use_deepspeed.")
    if _is_true(env, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise LaunchError(
            "the launcher asks for --use_parallelism_config, which recipes do not read",
            "Drop it; --strategy.shard_size gives hybrid shards.",
        )
    backend = env.get("ACCELERATE_DYNAMO_BACKEND", "NO")
    if backend.upper() != "NO":
        raise LaunchError(
            f"the launcher asks for --dynamo_backend {backend}", "Recipes do not compile the model: leave it at no."
        )


def _zero_stage(env: Environment) -> str:
    asked = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    path = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    stage = asked or "2"
    if path:
        try:
            stage = str(json.loads(Path(path).read_text(encoding="utf-8"))["zero_optimization"]["stage"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LaunchError(
                f"the launcher's DeepSpeed file {path} names no ZeRO stage: {error}",
                'Give it {"zero_optimization": {"stage": 1, 2 or 3}}.',
            ) from error
        if asked and asked != stage:
            raise LaunchError(
                f"the launcher asks for --zero_stage {asked}, but its file {path} for stage {stage}",
                "Drop one of the two.",
            )
    if stage not in ("1", "2", "3"):
        raise LaunchError(f"the launcher asks for DeepSpeed with --zero_stage {stage}", "Use 1, 2 or 3.")
    return stage


def _own(environment: Environment | None) -> Environment:
    return os.environ if environment is None else environment


def _number(env: Environment, name: str) -> int:
    if not env[name].isdecimal():
        raise LaunchError(f"{name}={env[name]!r} is not a number", "Start with `accelerate launch`, which sets it.")
    return int(env[name])


def _is_true(env: Environment, name: str) -> bool:
    # What accelerate takes for true.
    return env.get(name, "false").lower() in ("1", "true", "t", "yes", "y", "on")


def cores_of_this_process() -> int:
    """Cores that the operating system lets it use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
