"""Ranks that train a tiny model and save it, to be disturbed: by kills, full disks, damaged files."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from tests.parity.job import tiny_bert
from tests.ranks import _outcome, _rank, free_port
from toolkit.checkpoint.restore import Checkpoint, newest_good, restore
from toolkit.checkpoint.rng import rng_state
from toolkit.checkpoint.saver import Saver
from toolkit.checkpoint.store import Store
from toolkit.config import OptimConfig, StrategyConfig
from toolkit.data.loader import batch_shape
from toolkit.optim import adamw
from toolkit.precision import Precision
from toolkit.strategies import choose_strategy
from toolkit.world import world


class Trainer:
    """A tiny model on this rank, whose steps depend on nothing but their number; and its saver."""

    def __init__(
        self,
        run: Path | str,
        strategy: str = "fsdp",
        *,
        attempt: int = 1,
        keep: int = 2,
        keep_best: bool = False,
        asynchronous: bool = True,
        model: Callable[[], torch.nn.Module] = tiny_bert,
    ) -> None:
        self.world = world()
        self.world.connect()
        self.strategy = choose_strategy(
            StrategyConfig(name=strategy),  # type: ignore[arg-type]
            world=self.world,
            precision=Precision("fp32"),
            shape=batch_shape(2 * self.world.size, None, self.world.size),
            max_grad_norm=1.0,
        )
        self.strategy.setup(model(), lambda wrapped: adamw(wrapped, OptimConfig(lr=1e-3)))
        self.store = Store(Path(run))
        self.warnings: list[str] = []
        self.options = {"attempt": attempt, "keep": keep, "keep_best": keep_best, "asynchronous": asynchronous}
        self.saver = Saver(self.store, self.strategy, self.world, **self.options)  # type: ignore[arg-type]

    def resume(self) -> Checkpoint | None:
        found = newest_good(self.store, self.world, self.warnings.append)
        if found:
            restore(found, self.strategy, self.world)
        return found

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(1000 * number + self.world.rank)
        tokens = torch.randint(2, 100, (2, 12), generator=generator)
        with self.strategy.micro_batch(last=True):
            logits = self.strategy.forward({"input_ids": tokens}).logits
            self.strategy.backward(cross_entropy(logits, tokens[:, 0] % 3) / self.world.size)
        self.strategy.update(1e-3)

    def save(self, step: int, **metrics: float) -> float:
        return self.saver.save(self.manifest(step, **metrics), {"rng": rng_state()})

    def manifest(self, step: int, **metrics: float) -> dict[str, Any]:
        return {"step": step, "metrics": metrics, "scaler": {}, "world": {"ranks": self.world.size}}

    def saved(self, step: int, **metrics: float) -> str:
        """What the save of this step raises, or an empty text."""
        try:
            self.save(step, **metrics)
            self.saver.wait()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def digest(self) -> str:
        """Of all that this rank holds."""
        digest = hashlib.sha256()
        for name, shard in sorted(self.strategy.shards().items()):
            digest.update(f"{name} {shard.start} {shard.shape}".encode())
            digest.update(shard.data.numpy().tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        self.strategy.teardown()
        self.world.close()


def save_steps(run: str, last: int, strategy: str = "fsdp") -> list[str]:
    """Train that many steps and save each; the digests of this rank's part, by step."""
    trainer = Trainer(run, strategy, keep=last)
    digests = []
    for step in range(1, last + 1):
        trainer.step(step)
        trainer.save(step)
        digests.append(trainer.digest())
    trainer.saver.wait()
    trainer.close()
    return digests


def mostly_frozen_bert() -> BertForSequenceClassification:
    """Of 134 MB, which take their time to be saved; what is trained of it is tiny, so that steps are fast."""
    torch.manual_seed(7)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=2**20, num_labels=3, **size))
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    return model.eval()  # without dropout, a step depends on its number alone


class Crew:
    """`function(*args)` on ranks that can be killed one by one."""

    def __init__(self, function: Callable[..., Any], size: int, *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        port = free_port()
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        self._readers = [reader for reader, _ in pipes]
        self.ranks = [
            context.Process(target=_rank, args=(function, rank, size, port, args, writer), daemon=True)
            for rank, (_, writer) in enumerate(pipes)
        ]
        for rank in self.ranks:
            rank.start()
        for _, writer in pipes:
            writer.close()

    @property
    def alive(self) -> bool:
        return all(rank.is_alive() for rank in self.ranks)

    def kill(self, *ranks: int) -> None:
        """Those, or all."""
        for rank in ranks or range(len(self.ranks)):
            os.kill(self.ranks[rank].pid or 0, signal.SIGKILL)

    def outcomes(self, timeout: float) -> list[tuple[str, Any]]:
        """What each rank raised ("died" for a killed one) and returned; all have ended. It is an error to hang."""
        end = time.monotonic() + timeout
        outcomes = [_outcome(reader, max(0.0, end - time.monotonic())) for reader in self._readers]
        for rank in self.ranks:
            rank.join(timeout=max(0.1, end - time.monotonic()))
        hanging = [number for number, rank in enumerate(self.ranks) if rank.is_alive()]
        for number in hanging:
            self.ranks[number].kill()
        assert not hanging, f"ranks {hanging} did not end in {timeout} s: {outcomes}"
        return outcomes


class SmallDisk:
    """A tmpfs of its own, seen by nobody else: mounted in the mount namespace of a shell that waits for orders."""

    def __init__(self, folder: Path, size: str) -> None:
        folder.mkdir()
        self._mount = folder
        self._shell = subprocess.Popen(
            [*_new_mounts(), "sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.order(f"mount -t tmpfs -o size={size} tmpfs {folder}")
        self.path = Path(f"/proc/{self._shell.pid}/root{folder}")

    def order(self, command: str) -> None:
        assert self._shell.stdin
        assert self._shell.stdout
        self._shell.stdin.write(f"{command} && echo done || echo failed\n")
        self._shell.stdin.flush()
        answer = self._shell.stdout.readline().strip()
        assert answer == "done", answer

    def read_only(self, on: bool) -> None:
        self.order(f"mount -o remount,{'ro' if on else 'rw'} {self._mount}")

    def close(self) -> None:
        self._shell.communicate()


def _new_mounts() -> list[str]:
    """The command under which mounts are private and allowed; for `pytest.skip`, an empty one where none is."""
    tries = (["unshare", "-m"], ["unshare", "-rm"])
    return next((t for t in tries if shutil.which("unshare") and not _fails([*t, *_TRIAL])), [])


_TRIAL = ["mount", "-t", "tmpfs", "tmpfs", "/mnt"]


def _fails(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


def can_mount() -> bool:
    return bool(_new_mounts())


def leave_free(disk: Path, pages: int) -> None:
    """Fill the disk up to so many free pages."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    room = os.statvfs(disk)
    filler.write_bytes(b"x" * (room.f_bavail - pages) * room.f_frsize)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """What happens to the entries of a folder in the block, in order, as the kernel tells: "+name" and "-name"."""
    libc = ctypes.CDLL(None, use_errno=True)
    moved_from, moved_to, create, delete = 0x40, 0x80, 0x100, 0x200
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(descriptor, bytes(folder), moved_from | moved_to | create | delete) >= 0
    events: list[str] = []
    try:
        yield events
        content = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(descriptor, 2**16):
                content += part
        while content:
            _, mask, _, length = struct.unpack_from("iIII", content)
            name = content[16 : 16 + length].rstrip(b"\0").decode()
            events.append(("+" if mask & (create | moved_to) else "-") + name)
            content = content[16 + length :]
    finally:
        os.close(descriptor)
