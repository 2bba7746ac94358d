"""The ledger of samples: what each rank has really computed, step by step; and the plan that it is held against.

Every line is handed to the operating system at once, so that it outlives a kill of the process; it is flushed to the
disk with each checkpoint, for a loss of power takes the run back to one anyway.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from toolkit.checkpoint.attempts import ledger_folder
from toolkit.checkpoint.lines import writing
from toolkit.checkpoint.manifest import write_file
from toolkit.errors import CheckpointError
from toolkit.folders import Guard, sync_folder, unguarded

PLAN = "plan.json"
IDS = "ids.safetensors"

_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode  # made once: `dumps` makes one a call


class Ledger:
    """What one rank consumes in one attempt.

    Raises:
        CheckpointError: the file is there already, or cannot be written; of each method.
        FencedError: of the guard, which is asked before each line.
    """

    def __init__(self, run: Path, attempt: int, rank: int, guard: Guard = unguarded) -> None:
        self._guard = guard
        self.path = ledger_folder(run, attempt) / f"rank_{rank:05d}.jsonl"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                raise CheckpointError(f"{self.path} is there already", "Another process writes to this run: stop one.")
            self._file = self.path.open("xb", buffering=0)

    def write(
        self, step: int, epoch: int, samples: int, ids: Sequence[int], skipped: Sequence[tuple[int, str]] = ()
    ) -> None:
        """Enter a step.

        Args:
            step, epoch: of the step; the first step is 1, the first epoch 0.
            samples: of the step over all ranks.
            ids: what this rank has computed.
            skipped: id of each sample that was dealt to this rank and left out, and why.
        """
        record: dict[str, object] = {"step": step, "epoch": epoch, "samples": samples, "ids": list(map(int, ids))}
        if skipped:
            record["skipped"] = [(int(sample), reason) for sample, reason in skipped]
        line = _encode(record).encode() + b"\n"
        self._guard()
        with writing(self.path):
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Flush to the disk."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_plan(run: Path, seed: int, global_batch: int, ids: Sequence[int]) -> None:
    """Write what is to be consumed: rank 0 does, when the run begins.

    Args:
        run: its folder.
        seed: of the order.
        global_batch: samples of a step.
        ids: of all samples, each of which has its own, in the order of the rows.
    """
    # A slice of a column of an Arrow data set is a list; one by one it is five times as slow.
    rows = np.asarray(ids[:], dtype=np.int64)
    folder = run / "samples"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / IDS, save({"ids": rows}))
        plan = {"seed": seed, "global_batch": global_batch, "samples": len(rows)}
        _replace(folder / PLAN, (json.dumps(plan) + "\n").encode())
        sync_folder(folder)


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    write_file(aside, content)
    aside.rename(path)
