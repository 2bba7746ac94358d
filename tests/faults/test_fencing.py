"""A start of a run that was taken for dead wakes up again while another one has gone on: it writes nothing any more."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from recipes.bert_cls import main as recipe_main
from tests.faults.jobs import Job, Reference, differences, last_step
from toolkit.checkpoint.store import QUARANTINE, Store
from toolkit.errors import USER_ERROR_EXIT_CODE
from toolkit.recovery import LEDGER_CHECKS


def in_job(config: Any, start: int) -> None:
    """The recipe as a job of SLURM runs it that was queued again `start` times."""
    os.environ.update({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(start)})
    recipe_main(config)


def files_of(run: Path) -> dict[Path, bytes]:
    """All but what is in quarantine: there, who was stopped in the middle of a save finishes the file it has open."""
    shelf = run / "checkpoints" / QUARANTINE
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and shelf not in path.parents}


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_that_were_stopped_come_back(
    ranks: int, saving: bool, tiny_job: list[str], reference: Reference, tmp_path: Path
) -> None:
    run, options = tmp_path / "run", [*tiny_job, "--train.steps", "60", "--checkpoint.every", "5"]
    old = Job(options, run, ranks, functools.partial(in_job, start=0))
    old.until(lambda: last_step(run) >= 12, timeout=90)
    if saving:
        old.until(lambda: bool(Store(run).unfinished()), timeout=30)
    old.kill(number=signal.SIGSTOP)
    outdated = time.monotonic() + LEDGER_CHECKS
    assert last_step(run) < 60
    new = Job(options, run, ranks, functools.partial(in_job, start=1)).wait()
    assert new.codes == [0] * ranks, new.text
    time.sleep(max(0.0, outdated - time.monotonic()))  # so long a rank may go on with the ledger that is its own
    before = files_of(run)
    old.kill(number=signal.SIGCONT)
    began = time.monotonic()
    ended = old.wait(30)
    assert time.monotonic() - began < 10
    assert set(ended.codes) == {USER_ERROR_EXIT_CODE}
    assert files_of(run) == before
    assert differences(run, reference(options, ranks)) == []
