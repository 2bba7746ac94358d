"""`python -m launch config`: files for `accelerate launch --config_file`, for the ways of starting that were tested.

`accelerate config` asks its questions one by one and can write files that start something else than they say: with
`distributed_type: MULTI_CPU`, or with `--cpu --num_processes 2`, one process runs. `render` writes those that do.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass

STRATEGIES = ("ddp", "fsdp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Start:
    """Which processes to start.

    Attributes:
        processes: of all nodes together.
        strategy: of `STRATEGIES`. A recipe's `--strategy.name` may still choose another one where this is `ddp`.
        cpu: CPU ranks, even where there are GPUs.
        nodes: machines. With several, each is started by hand with its own `--machine_rank`.
        address: of the first node, as the others see it; needed with several nodes.
        port: on the first node.
        comment: first lines of the file.
    """

    processes: int = 1
    strategy: str = "ddp"
    cpu: bool = False
    nodes: int = 1
    address: str = ""
    port: int = 29500
    comment: tuple[str, ...] = ()


def main(argv: Sequence[str]) -> int:
    """Print the file that these options ask for; the exit code is 2 after a mistake of the user."""
    parser = ArgumentParser(prog="python -m launch config", description="Print a configuration file.")
    parser.add_argument("--processes", type=int, default=1, help="of all nodes together (default: 1)")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="what to ask the recipe for")
    parser.add_argument("--cpu", action="store_true", help="CPU ranks, even where there are GPUs")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parser.add_argument("--address", default="", help="of the first node, as the others see it")
    parser.add_argument("--port", type=int, default=29500, help="on the first node (default: 29500)")
    try:
        print(render(Start(**vars(parser.parse_args(argv)))), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def render(start: Start) -> str:
    """The YAML for `accelerate launch --config_file`.

    Raises:
        ValueError: a combination that cannot start.
    """
    _check(start)
    lines = [f"# {line}" if line else "#" for line in start.comment]
    lines += ["compute_environment: LOCAL_MACHINE", f"distributed_type: '{_kind(start)}'"]
    if start.strategy == "fsdp":
        lines += ["fsdp_config:", "  fsdp_version: 2", "  fsdp_reshard_after_forward: true"]
        lines += ["  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP", "  fsdp_offload_params: false"]
    if start.strategy.startswith("zero"):
        lines += ["deepspeed_config:", f"  zero_stage: {start.strategy[-1]}"]
        lines += ["  offload_optimizer_device: none", "  offload_param_device: none"]
        if start.nodes > 1:
            # Otherwise accelerate starts the other nodes itself, over pdsh and with a copy of the environment.
            lines += ["  deepspeed_multinode_launcher: standard"]
    lines += ["dynamo_config:", "  dynamo_backend: 'NO'", "mixed_precision: 'no'"]
    lines += [f"use_cpu: {str(start.cpu).lower()}", f"num_machines: {start.nodes}", f"num_processes: {start.processes}"]
    if start.nodes > 1:
        lines += ["machine_rank: 0", f"main_process_ip: {start.address}", f"main_process_port: {start.port}"]
        lines += ["same_network: true"]
    return "\n".join(lines) + "\n"


def _kind(start: Start) -> str:
    if start.processes == 1:
        return "NO"
    if start.strategy == "fsdp":
        return "FSDP"
    if start.strategy.startswith("zero"):
        return "DEEPSPEED"
    # Also for CPU ranks: MULTI_CPU starts one process only.
    return "MULTI_GPU"


def _check(start: Start) -> None:
    if start.strategy not in STRATEGIES:
        raise ValueError(f"strategy {start.strategy!r} is not one of {', '.join(STRATEGIES)}")
    if start.processes < 1 or start.nodes < 1 or start.processes % start.nodes:
        raise ValueError(f"{start.processes} processes cannot be spread evenly over {start.nodes} nodes")
    if start.processes == 1 and start.strategy != "ddp":
        raise ValueError(f"{start.strategy} needs at least two processes")
    if start.nodes > 1 and not start.address:
        raise ValueError("several nodes need the address of the first one")
