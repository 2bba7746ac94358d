"""Whole runs of a recipe on real ranks that can be killed, stopped and signalled one by one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tests.parity.state import joined
from tests.ranks import free_port
from tests.recipes.launching import recipe
from toolkit.checkpoint.account import account
from toolkit.checkpoint.attempts import Attempts
from toolkit.checkpoint.manifest import read_manifest
from toolkit.checkpoint.store import Store

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

SAME_IN_REPORTS = ("status", "steps", "evaluations", "before", "test", "bad_rows", "left_out", "skipped_steps")

Main = Callable[[Any], None]
Reference = Callable[..., Path]
"""`reference(options, ranks)` gives the folder of an uninterrupted run."""


@dataclass
class Ended:
    """How the ranks ended: exit codes (negative for a signal) and what each printed, where it could say so."""

    codes: list[int]
    texts: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


class Job:
    """Ranks that run the recipe with `options` into the folder `run`, started as soon as it is made.

    Another `main` with the same settings may stand in for the recipe's; it is pickled. They meet at a free port, or at
    the one that is given.
    """

    def __init__(
        self, options: Sequence[str], run: Path, ranks: int = 1, main: Main | None = None, port: int | None = None
    ) -> None:
        self.run = run
        context = multiprocessing.get_context("forkserver")
        port, argv = port or free_port(), [*options, "--run.dir", str(run)]
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        self._readers = [reader for reader, _ in pipes]
        self.ranks = [
            context.Process(target=_rank, args=(argv, str(run.parent), rank, ranks, port, writer, main), daemon=True)
            for rank, (_, writer) in enumerate(pipes)
        ]
        for rank in self.ranks:
            rank.start()
        for _, writer in pipes:
            writer.close()

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to these ranks, or to all."""
        for rank in ranks or range(len(self.ranks)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.ranks[rank].pid or 0, number)

    def until(self, condition: Callable[[], Any], timeout: float = 60) -> None:
        """Wait until something is so, or the ranks have ended, or the time is up (an error)."""
        end = time.monotonic() + timeout
        while not condition() and any(rank.is_alive() for rank in self.ranks):
            assert time.monotonic() < end, f"waited {timeout} s in vain"
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        self.until(lambda: last_step(self.run) >= step)

    def wait(self, timeout: float = 90) -> Ended:
        """Wait for all ranks; those that are still there when the time is up are killed, and that is an error."""
        end = time.monotonic() + timeout
        texts = []
        for reader in self._readers:
            text = "(said nothing)"
            with contextlib.suppress(EOFError, OSError):
                if reader.poll(max(0.0, end - time.monotonic())):
                    text = reader.recv()
            texts.append(text)
        for rank in self.ranks:
            rank.join(timeout=max(0.1, end - time.monotonic()))
        alive = [number for number, rank in enumerate(self.ranks) if rank.is_alive()]
        for number in alive:
            self.ranks[number].kill()
            self.ranks[number].join()
        assert not alive, f"ranks {alive} did not end in {timeout} s:\n" + "\n".join(texts)
        return Ended([rank.exitcode or 0 for rank in self.ranks], texts)


def finish(options: Sequence[str], run: Path, ranks: int = 1, main: Main | None = None) -> Ended:
    """The same command line once more, to its end."""
    ended = Job(options, run, ranks, main).wait()
    assert ended.codes == [0] * ranks, ended.text
    return ended


def _rank(argv: list[str], cwd: str, rank: int, size: int, port: int, writer: Any, main: Main | None) -> None:
    # A rank of a test is a daemon, which may have no children, and starts processes as it was started. A run's loader
    # has children, and forks them.
    multiprocessing.current_process().daemon = False
    multiprocessing.set_start_method("fork", force=True)
    if size > 1:
        os.environ.update(dict(zip(NAMES, map(str, (rank, rank, size, size, "127.0.0.1", port)), strict=True)))
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    code, text = recipe(argv, cwd, main)
    writer.send(text)
    writer.close()
    raise SystemExit(code)


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl, while it is being written."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads((run / "metrics.jsonl").read_bytes().rpartition(b"\n")[0].rpartition(b"\n")[2])["step"])
    return 0


def curve(run: Path) -> list[tuple[Any, ...]]:
    """What must be equal to the last bit: step, loss, gradient norm, learning rate, units, samples."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in ("step", "loss", "grad_norm", "lr", "units", "samples_seen")) for line in lines]


def figures(run: Path) -> list[dict[str, Any]]:
    """All that stands in metrics.jsonl but what a clock has measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("seconds", "samples_per_second")} for line in lines]


def report(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "report.json").read_text())
    return found


def said(text: str) -> str:
    """Without the frame and the line breaks of a screen."""
    return re.sub(r"[\s│]+", " ", text)


def differences(run: Path, reference: Path) -> list[str]:
    """What tells a run that went on from one that was never interrupted; and what is wrong with its account."""
    found = [
        f"step {ours.get('step')}: {ours}, not {theirs}"
        for ours, theirs in zip_longest(figures(run), figures(reference), fillvalue={})
        if ours != theirs
    ]
    ours, theirs = report(run), report(reference)
    found += [f"{key}: {ours[key]}, not {theirs[key]}" for key in SAME_IN_REPORTS if ours[key] != theirs[key]]
    (step, ours_saved), (_, theirs_saved) = Store(run).committed()[0], Store(reference).committed()[0]
    if step != theirs["steps"]:
        found.append(f"the newest checkpoint is of step {step}")
    tensors = joined(ours_saved), joined(theirs_saved)
    found += [name for name in tensors[0] | tensors[1] if not _same_bits(*(t.get(name) for t in tensors))]
    if read_manifest(ours_saved)["scaler"] != read_manifest(theirs_saved)["scaler"]:
        found.append("the loss scale")
    models = [
        # But for the card, which says how it was made: from which file, under which strategy.
        {path.name: path.read_bytes() for path in sorted((folder / "model").iterdir()) if path.name != "README.md"}
        for folder in (run, reference)
    ]
    found += [f"model/{name}" for name in models[0] | models[1] if models[0].get(name) != models[1].get(name)]
    return found + _gaps(run)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _gaps(run: Path) -> list[str]:
    """What is not continuous over the attempts, or does not add up."""
    found = []
    accounted, attempts = account(run), Attempts(run).read()
    if not accounted.sound or accounted.in_flight or accounted.steps != report(run)["steps"]:
        found.append(f"the account: {accounted}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    if seconds != sorted(seconds) or report(run)["seconds"] < seconds[-1]:
        found.append(f"seconds: {seconds}, {report(run)['seconds']} in the end")
    if report(run)["attempts"] != len(attempts):
        found.append(f"{report(run)['attempts']} attempts in the report, {len(attempts)} were begun")
    if left := Store(run).unfinished():
        found.append(f"left over: {left}")
    return found


def _same_bits(ours: Any, theirs: Any) -> bool:
    return ours is not None and theirs is not None and ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
