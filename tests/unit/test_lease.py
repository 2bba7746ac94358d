"""Who may write to a run's folder, and that a writer of old cannot, whatever the moment at which it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from toolkit.checkpoint.attempts import Attempts
from toolkit.checkpoint.store import Store
from toolkit.environment import Job
from toolkit.errors import CheckpointError, FencedError
from toolkit.folders import Guard, run_lock, unguarded, written_aside
from toolkit.lease import FOLDER, Lease, break_lock, newest_lease, take
from toolkit.report import RunFolder

FIRST, SECOND = Job("12", 0), Job("12", 1)


def test_the_last_one_holds_it(tmp_path: Path) -> None:
    first = take(tmp_path, FIRST)
    first.check()
    second = take(tmp_path, SECOND)
    second.check()
    Lease(tmp_path, second.number).check()  # of another rank
    with pytest.raises(FencedError, match=r"job 12, start 2 on .* has taken over") as error:
        first.check()
    assert str(tmp_path) in str(error.value)
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    (tmp_path / FOLDER / f"{second.number:08d}.json").unlink()
    with pytest.raises(FencedError, match="removed or emptied"):
        second.check()


def test_an_answer_holds_for_a_while(tmp_path: Path) -> None:
    first = take(tmp_path, FIRST)
    take(tmp_path, SECOND)
    first.check(max_age=60)
    with pytest.raises(FencedError):
        first.check(max_age=0)


def test_takers_at_the_same_moment(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        leases = list(pool.map(lambda number: take(tmp_path, Job(str(number))), range(40)))
    numbers = sorted(lease.number for lease in leases)
    assert len(set(numbers)) == 40
    assert newest_lease(tmp_path) == numbers[-1]


@pytest.mark.parametrize(
    ("job", "broken"),
    [(SECOND, True), (FIRST, False), (Job("13", 5), False), (Job(), False)],
    ids=["queued again", "the same start", "another job", "no job"],
)
def test_whose_lock_is_broken(job: Job, broken: bool, tmp_path: Path) -> None:
    held = run_lock(tmp_path)
    with held:
        break_lock(tmp_path, FIRST)
        take(tmp_path, FIRST)
        break_lock(tmp_path, job)
        mine = run_lock(tmp_path)
        if broken:
            mine.acquire(timeout=0)
            mine.release()
        else:
            with pytest.raises(TimeoutError):
                mine.acquire(timeout=0)


def test_the_lock_of_one_that_was_given_up(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        take(tmp_path, FIRST)
        (tmp_path / FOLDER / "00000002.json").write_text(json.dumps({"free": True}))
        break_lock(tmp_path, Job("99"))
        run_lock(tmp_path).acquire(timeout=0).lock.release()


def test_a_former_start_does_not_begin_again(tmp_path: Path) -> None:
    take(tmp_path, SECOND)
    with pytest.raises(FencedError, match="start 2"):
        break_lock(tmp_path, FIRST)


# A guard that takes the lease away in the very moment after it was asked: the writer was stopped there.


def stopped_after(run: Path) -> Guard:
    lease, taken = take(run, FIRST), []

    def guard() -> None:
        if not taken:
            lease.check()
            taken.append(take(run, SECOND))

    return guard


def test_what_is_appended_then(tmp_path: Path) -> None:
    RunFolder(tmp_path).append_metrics([{"step": 1}])
    RunFolder(tmp_path, stopped_after(tmp_path)).append_metrics([{"step": 2}])
    assert RunFolder(tmp_path).read_metrics() == [{"step": 1}]
    attempts = Attempts(tmp_path)
    attempts.begin(0)
    Attempts(tmp_path, stopped_after(tmp_path)).begin(1)
    attempts.end("finished", 1)
    assert [attempt.status for attempt in Attempts(tmp_path).read()] == ["finished"]


def test_what_is_replaced_then(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_report({"status": "new"})
    with pytest.raises(CheckpointError, match="report.json"):
        RunFolder(tmp_path, stopped_after(tmp_path)).write_report({"status": "old"})
    assert RunFolder(tmp_path).read_report() == {"status": "new"}
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_checkpoint_then(tmp_path: Path) -> None:
    store = Store(tmp_path, stopped_after(tmp_path))
    aside = store.aside(5, 1)
    aside.mkdir(parents=True)  # `begin` has been through
    take(tmp_path, SECOND)
    assert len(Store(tmp_path).clean()) == 1  # as a start does
    with pytest.raises((CheckpointError, OSError)):
        store.commit(aside, 5, {"step": 5, "files": {}})
    assert store.committed() == []


def test_a_folder_then(tmp_path: Path) -> None:
    """As of a model: stopped while it was written, or just before it took its place."""
    target, lease = tmp_path / "model", take(tmp_path, FIRST)

    def write(text: str, guard: Guard = unguarded, stopped: Callable[[], object] = unguarded) -> None:
        with written_aside(target, guard) as aside:
            (aside / "first").write_text(text, encoding="utf-8")
            stopped()
            (aside / "second").write_text(text, encoding="utf-8")

    with pytest.raises(CheckpointError, match="model"):
        write("old", lease.check, lambda: (take(tmp_path, SECOND), write("new")))
    assert {path.read_text(encoding="utf-8") for path in target.iterdir()} == {"new"}
    with pytest.raises(CheckpointError, match="model"):
        write("old", stopped_after(tmp_path))
    assert {path.read_text(encoding="utf-8") for path in target.iterdir()} == {"new"}
    with pytest.raises(FencedError):
        write("old", lease.check)
    assert {path.name for path in tmp_path.iterdir()} == {".lease", "model"}


def test_what_is_written_afterwards(tmp_path: Path) -> None:
    lease = take(tmp_path, FIRST)
    folder, store = RunFolder(tmp_path, lease.check), Store(tmp_path, lease.check)
    folder.append_metrics([{"step": 1}])
    folder.write_report({"status": "running"})
    take(tmp_path, SECOND)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for write in (
        lambda: folder.append_metrics([{"step": 2}]),
        lambda: folder.write_report({}),
        lambda: folder.write_config("a: 1"),
        lambda: folder.write_manifest({}),
        lambda: Attempts(tmp_path, lease.check).begin(1),
        lambda: store.begin(store.aside(2, 1)),
        lambda: store.retain(1, best=False),
    ):
        with pytest.raises(FencedError):
            write()
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {tmp_path / "attempts.jsonl"}
    assert (tmp_path / "attempts.jsonl").read_bytes() == b""  # opened, and nothing written
