"""Ranks for tests: real processes with a real gloo group, forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

# The last is what `deepspeed.initialize` imports late, and with it torch's compiler, which takes seconds.
PRELOAD = [
    "torch",
    "transformers",
    "datasets",
    "deepspeed",
    "tests.ranks",
    "tests.parity.job",
    "recipes.bert_cls",
    "deepspeed.runtime.zero.muon.original_muon",
]


class RankFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


def start_server() -> None:
    """Let the fork server import what ranks need (an import costs seconds, a fork milliseconds)."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["ACCELERATE_USE_CPU"] = "true"
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)


def on_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """`function(*args)` on `size` ranks at once; what each returned, by rank."""
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        context.Process(target=_rank, args=(function, rank, size, port, args, writer), daemon=True)
        for rank, (_, writer) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    for _, writer in pipes:
        writer.close()
    outcomes = [_outcome(reader, timeout) for reader, _ in pipes]
    for rank in ranks:
        rank.join(timeout=10)
        if rank.is_alive():
            rank.kill()
    failures = [f"rank {rank}:\n{error}" for rank, (error, _) in enumerate(outcomes) if error]
    if failures:
        raise RankFailed("\n".join(failures))
    return [value for _, value in outcomes]


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _outcome(reader: Any, timeout: float) -> tuple[str, Any]:
    if not reader.poll(timeout):
        return f"said nothing in {timeout} s", None
    try:
        error, value = reader.recv()
    except EOFError:
        return "died", None
    return error, value


def _rank(function: Callable[..., Any], rank: int, size: int, port: int, args: Any, writer: Any) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, size, size, "127.0.0.1", port)
    if size > 1:
        os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
        os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    try:
        writer.send(("", function(*args)))
    except BaseException:
        writer.send((traceback.format_exc(), None))
