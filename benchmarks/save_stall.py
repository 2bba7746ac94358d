"""What a save costs training: this toolkit's asynchronous save against saves that training waits for.

    python benchmarks/save_stall.py
    python benchmarks/save_stall.py --ranks 2

An encoder of MiniLM's size (22.7 M parameters, random weights; 272 MB with AdamW's moments) takes steps of 32 × 64
tokens. Blocks of steps take turns: without a save, with the toolkit's save after the block's first step, and with the
two that one would write by hand: `torch.save`, and what `accelerate.save_state` does (weights by safetensors, optimizer
by `torch.save`). A noisy machine slows all alike. The toolkit flushes to the disk, hashes, and commits in one rename;
the other two do none of it. Last, the same bytes are written with and without the hashing.
Goals: training waits at most 5 % of a step for a save, and hashing adds at most 10 % to one.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.lines import write_line
from toolkit.checkpoint.manifest import write_file
from toolkit.checkpoint.rng import rng_state
from toolkit.checkpoint.saver import Saver
from toolkit.checkpoint.store import Store
from toolkit.config import OptimConfig, StrategyConfig
from toolkit.data.loader import batch_shape
from toolkit.optim import adamw
from toolkit.precision import choose_precision
from toolkit.strategies import choose_strategy
from toolkit.world import world

BATCH, TOKENS, LABELS, VOCABULARY = 32, 64, 5, 30522
WARM_UP = 3
NONE, OURS, TORCH, ACCELERATE = "no save", "toolkit, asynchronous", "torch.save", "as accelerate.save_state"
STALL_GOAL, HASHING_GOAL = 0.05, 0.10


def main() -> None:
    """Measure on all ranks; print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="gloo processes that share the batch (default: 1)")
    parser.add_argument("--steps", type=int, default=20, help="of a block, with one save (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each kind (default: 5)")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: that of temporary files)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the JSON line to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="save_stall_", dir=options.folder) as folder:
        result = on_ranks(options, Path(folder))
    show(result)
    write_line(result, options.json)


def on_ranks(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What rank 0 has measured."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    reader, writer = context.Pipe(duplex=False)
    ranks = [
        context.Process(target=_rank, args=(rank, port, options, folder, writer), daemon=True)
        for rank in range(options.ranks)
    ]
    for rank in ranks:
        rank.start()
    writer.close()
    try:
        result: dict[str, Any] = reader.recv()
    except EOFError:
        raise SystemExit("a rank has failed: see above") from None
    for rank in ranks:
        rank.join()
    return result


def _rank(rank: int, port: int, options: argparse.Namespace, folder: Path, writer: Connection) -> None:
    if options.ranks > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = (rank, rank, options.ranks, options.ranks, "127.0.0.1", port)
        os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
    threads = max(1, (os.cpu_count() or 1) // options.ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # or accelerate says that it sets it
    torch.set_num_threads(threads)
    job = Job(folder, options)
    result = job.measure(options.steps, options.rounds)
    result["hashing"] = job.world.on_main(lambda: hashing(folder, job.content(), options.rounds))
    if rank == 0:
        writer.send(result)
    writer.close()
    job.strategy.teardown()
    job.world.close()


class Job:
    """A model that takes steps on this rank, and the ways to save it.

    Args:
        folder: to save in, the same on all ranks.
        options: of the command line.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.world = world()
        self.world.connect()
        self.precision = choose_precision(options.precision, self.world)
        self.strategy: Any = choose_strategy(
            StrategyConfig(),
            world=self.world,
            precision=self.precision,
            shape=batch_shape(BATCH, None, self.world.size),
            max_grad_norm=1.0,
        )
        torch.manual_seed(0)
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        model = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=LABELS, **sizes))
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.strategy.setup(model, lambda wrapped: adamw(wrapped, OptimConfig()))
        self.strategy.model.train()
        self.tokens = torch.randint(2, VOCABULARY, (BATCH // self.world.size, TOKENS))
        self.labels = torch.randint(LABELS, (len(self.tokens),))
        self.number = 0
        self.saver = Saver(
            Store(folder / "run"), self.strategy, self.world, attempt=1, keep=1, keep_best=False, asynchronous=True
        )
        self.ways: dict[str, Callable[[], object]] = {
            NONE: lambda: None,
            OURS: self._save,
            TORCH: lambda: self._by_hand(self._torch_save),
            ACCELERATE: lambda: self._by_hand(self._save_state),
        }

    def measure(self, steps: int, rounds: int) -> dict[str, Any]:
        """Rounds of one block of each kind."""
        stalls: dict[str, list[float]] = {way: [] for way in self.ways}
        blocks: dict[str, list[list[float]]] = {way: [] for way in self.ways}
        for _ in range(WARM_UP):
            self._step()
        for number in range(rounds):
            ways = list(self.ways)
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:  # who goes first alternates
                stall, seconds = self._block(self.ways[way], steps)
                stalls[way].append(stall)
                blocks[way].append(seconds)
        step = statistics.median(seconds for block in blocks[NONE] for seconds in block)
        rows = [self._row(way, stalls[way], blocks[way], blocks[NONE], step) for way in self.ways if way != NONE]
        return {
            "benchmark": "save_stall",
            "ranks": self.world.size,
            "parameters": self.parameters,
            "bytes": sum(part.nbytes for part in self.content()),
            "precision": self.precision.name,
            "batch": [BATCH, TOKENS],
            "steps_between_saves": steps,
            "saves": rounds,
            "step_ms": step * 1e3,
            "ways": rows,
            "toolkit_total_s": statistics.median(timing.total for timing in self.saver.timings),
            "threads": torch.get_num_threads(),
            "load": [round(load, 1) for load in os.getloadavg()],
            "torch": torch.__version__,
            "device": f"{os.cpu_count()} cores, {platform.machine()}",
        }

    def content(self) -> list[memoryview]:
        """The bytes of the state."""
        return [shard.data.view(torch.uint8).numpy().data for shard in self.strategy.shards().values()]

    def _row(
        self, way: str, stalls: list[float], blocks: list[list[float]], without: list[list[float]], step: float
    ) -> dict[str, Any]:
        stall = statistics.median(stalls)
        # Blocks of one round, which the machine's other work has slowed alike.
        extra = [(sum(a) + waited) / sum(b) - 1 for a, waited, b in zip(blocks, stalls, without, strict=True)]
        return {
            "way": way,
            "stall_ms": stall * 1e3,
            "stall_max_ms": max(stalls) * 1e3,
            "stall_share_of_step": stall / step,
            "overhead": statistics.median(extra),
            "overhead_ms_of_each_step": statistics.median(extra) * step * 1e3,
            "overhead_range": [min(extra), max(extra)],
        }

    def _block(self, save: Callable[[], object], steps: int) -> tuple[float, list[float]]:
        """What the save took of training's time, and what each step took."""
        seconds, stall = [], 0.0
        for number in range(steps):
            began = time.perf_counter()
            self._step()
            stepped = time.perf_counter()
            seconds.append(stepped - began)
            if number == 0:
                save()
                stall = time.perf_counter() - stepped
        self.saver.wait()  # a save is over long before; otherwise the next block would pay for it
        return stall, seconds

    def _step(self) -> None:
        self.number += 1
        with self.strategy.micro_batch(last=True):
            logits = self.strategy.forward({"input_ids": self.tokens}).logits
            self.strategy.backward(cross_entropy(logits, self.labels) / self.world.size)
        self.strategy.update(1e-4)

    def _save(self) -> None:
        manifest = {"step": self.number, "metrics": {}, "scaler": {}, "world": {"ranks": self.world.size}}
        self.saver.save(manifest, {"rng": rng_state()})

    def _by_hand(self, save: Callable[[], None]) -> None:
        """On rank 0, while the others wait."""
        if self.world.main:
            save()
        if self.world.connected:
            dist.barrier()

    def _torch_save(self) -> None:
        state = {"model": self.strategy.module.state_dict(), "optimizer": self.strategy.optimizer.state_dict()}
        torch.save(state, self.folder / "state.pt")

    def _save_state(self) -> None:
        save_file(self.strategy.module.state_dict(), self.folder / "model.safetensors", metadata={"format": "pt"})
        torch.save(self.strategy.optimizer.state_dict(), self.folder / "optimizer.bin")


def hashing(folder: Path, parts: Sequence[memoryview], rounds: int) -> dict[str, Any]:
    """The same bytes to the same disk, with the hash beside the writing and without, in turns."""
    path = folder / "bytes"
    seconds: tuple[list[float], list[float]] = [], []
    for number in range(2 * rounds):
        for hashed in (True, False) if number % 2 else (False, True):
            path.unlink(missing_ok=True)
            began = time.perf_counter()
            write_file(path, *parts) if hashed else _write(path, parts)
            seconds[hashed].append(time.perf_counter() - began)
    began, digest = time.thread_time(), hashlib.sha256()
    for part in parts:
        digest.update(part)
    plain, both = (statistics.median(times) for times in seconds)
    return {
        "write_s": plain,
        "write_and_hash_s": both,
        "added": statistics.median(b / a for a, b in zip(*seconds, strict=True)) - 1,
        "hash_alone_cpu_s": time.thread_time() - began,
    }


def _write(path: Path, parts: Sequence[memoryview]) -> None:
    """As `write_file`, without the hash."""
    with path.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def show(result: dict[str, Any]) -> None:
    """The table, and below it the goals."""
    table = Table(
        title=f"{result['parameters']:,} parameters, {result['bytes'] / 1e6:.0f} MB of state; {result['ranks']} "
        f"process{'es' * (result['ranks'] > 1)}, {result['precision']}; a step takes {result['step_ms']:.0f} ms, "
        f"a save every {result['steps_between_saves']} steps",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("save", "training waits\n(most), ms", "of a step", "all it costs,\nof the time", "from – to"):
        table.add_column(heading, justify="left" if heading == "save" else "right", no_wrap=True)
    for row in result["ways"]:
        table.add_row(
            row["way"],
            f"{row['stall_ms']:.0f} ({row['stall_max_ms']:.0f})",
            f"{row['stall_share_of_step']:.1%}",
            f"{row['overhead']:+.1%}",
            " – ".join(f"{share:+.1%}" for share in row["overhead_range"]),
        )
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False, highlight=False)
    console.print(table)
    stall = next(row["stall_share_of_step"] for row in result["ways"] if row["way"] == OURS)
    found = result["hashing"]
    console.print(
        f"stall              {stall:.1%} of a step; goal {STALL_GOAL:.0%}: {_verdict(stall, STALL_GOAL)}\n"
        f"save from its begin to its end, beside training: {result['toolkit_total_s']:.2f} s\n"
        f"hashing            adds {found['added']:+.1%} to writing ({found['write_s']:.2f} s without, "
        f"{found['write_and_hash_s']:.2f} s with; alone {found['hash_alone_cpu_s']:.2f} s of a core, "
        f"{found['hash_alone_cpu_s'] / result['toolkit_total_s']:.0%} of the save beside training); "
        f"goal {HASHING_GOAL:.0%}: {_verdict(found['added'], HASHING_GOAL)}"
    )


def _verdict(value: float, goal: float) -> str:
    return "kept" if value <= goal else "MISSED"


if __name__ == "__main__":
    main()
