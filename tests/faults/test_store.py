"""The store on the disk: what it keeps, what it takes for the newest, and what it refuses."""

from __future__ import annotations

import hashlib
import os
import random
import time
from pathlib import Path

import pytest

from tests.faults.saving import Crew, Trainer, watched
from tests.ranks import on_ranks
from toolkit.checkpoint.manifest import DIGEST, MANIFEST, inspect
from toolkit.checkpoint.restore import newest_good
from toolkit.checkpoint.store import POINTER, QUARANTINE_KEEPS, Store
from toolkit.errors import CheckpointError
from toolkit.world import world

NAMES = ("first", "second")


def write(store: Store, step: int, loss: float | None = None, attempt: int = 1, best_step: int | None = None) -> Path:
    """A small checkpoint that is good."""
    aside = store.aside(step, attempt)
    store.begin(aside)
    contents = {name: f"{name} of {step}".encode() for name in NAMES}
    for name, content in contents.items():
        (aside / name).write_bytes(content)
    files = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    metrics = {} if loss is None else {"validation_loss": loss}
    state = {} if best_step is None else {"state": {"best_step": best_step}}
    return store.commit(aside, step, {"step": step, "metrics": metrics, "files": files} | state)


def steps(store: Store) -> list[int]:
    return [step for step, _ in store.committed()]


def newest(store: Store) -> tuple[int | None, list[str]]:
    warnings: list[str] = []
    found = newest_good(store, world(), warnings.append)
    return found.step if found else None, warnings


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


def test_a_store_without_a_folder_is_empty(store: Store) -> None:
    assert (store.committed(), store.unfinished(), store.pointer(), store.best()) == ([], [], None, None)
    assert newest(store) == (None, [])
    assert not store.folder.exists()


def test_what_a_commit_does_in_which_order(store: Store) -> None:
    write(store, 1)
    with watched(store.folder) as events:
        write(store, 2)
        store.retain(1, best=False)
    aside, removing = ".writing_step_00000002_attempt_0001", f".removing_step_00000001_{os.getpid()}"
    assert events == [
        *(f"+{aside}", f"-{aside}", "+step_00000002"),
        *("+.latest.json", "-.latest.json", "+latest.json"),
        *("-step_00000001", f"+{removing}", f"-{removing}"),
    ]


@pytest.mark.parametrize("damage", ["shorter", "missing", "manifest", "foreign"])
def test_retention_counts_good_ones_only(store: Store, damage: str) -> None:
    for step in range(1, 7):
        folder = write(store, step)
        if step in (4, 5):
            {
                "shorter": lambda folder=folder: os.truncate(folder / "first", 3),
                "missing": (folder / "second").unlink,
                "manifest": lambda folder=folder: (folder / MANIFEST).write_text("{}"),
                "foreign": lambda folder=folder: (folder / "core").write_text("…"),
            }[damage]()
    store.retain(2, best=False)
    assert steps(store) == [6, 5, 4, 3], "3 and 6 are the newest two that are good; a start judges the others"
    assert newest(store) == (6, [])


def test_retention_keeps_the_best_one_beside_the_newest(store: Store) -> None:
    for step, loss in enumerate([0.9, 0.3, 0.3, float("nan"), None, 0.7, 0.8], start=1):
        write(store, step, loss)
    assert store.best() == store.folder / "step_00000002", "of equals, the earlier"
    store.retain(2, best=True)
    assert steps(store) == [7, 6, 2]
    write(store, 8, 0.1)
    store.retain(2, best=True)
    assert steps(store) == [8, 7]
    assert store.best() == store.folder / "step_00000008"


def test_the_best_one_may_have_been_evaluated_after_it_was_saved(store: Store) -> None:
    write(store, 1, 0.5, best_step=1)
    write(store, 2, None, best_step=1)  # a signal put its evaluation off; the next attempt made it
    write(store, 3, 0.4, best_step=2)
    store.retain(1, best=True)
    assert steps(store) == [3, 2]
    assert store.best() == store.folder / "step_00000002"


def test_a_pointer_that_cannot_move_is_no_lost_checkpoint(store: Store) -> None:
    write(store, 1)
    (store.folder / f".{POINTER}").mkdir()
    write(store, 2)
    assert store.pointer() == 1
    assert newest(store) == (2, [])


def test_the_best_one_gives_way_when_it_is_damaged(store: Store) -> None:
    for step, loss in enumerate([0.1, 0.3, 0.8, 0.9], start=1):
        write(store, step, loss)
    (store.folder / "step_00000001" / "first").unlink()
    assert store.best() == store.folder / "step_00000002"
    store.retain(1, best=True)
    assert steps(store) == [4, 2, 1]


def test_a_store_without_losses_has_no_best(store: Store) -> None:
    write(store, 1)
    write(store, 2, float("inf"))
    assert store.best() is None
    store.retain(1, best=True)
    assert steps(store) == [2]


def test_the_newest_is_the_one_with_the_highest_step(store: Store) -> None:
    """Whatever the clock said when it was written, and whatever the pointer says."""
    now = time.time()
    for step, hours in ((9, 0), (10, -48), (100_000_000, -1000), (8, +48)):
        folder = write(store, step)
        for path in (*folder.iterdir(), folder):
            os.utime(path, (now + 3600 * hours,) * 2)
    assert store.pointer() == 8
    assert newest(store)[0] == 100_000_000
    store.retain(2, best=False)
    assert steps(store) == [100_000_000, 10]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"step": "x"}', b"\xff", b'{"step": null}'])
def test_a_missing_or_damaged_pointer_does_no_harm(store: Store, content: bytes | None) -> None:
    write(store, 1)
    write(store, 2)
    pointer = store.folder / "latest.json"
    pointer.unlink() if content is None else pointer.write_bytes(content)
    assert store.pointer() is None
    assert newest(store) == (2, [])


def test_a_checkpoint_that_was_deleted_is_missed(store: Store) -> None:
    write(store, 1)
    store.remove(write(store, 2))
    step, warnings = newest(store)
    assert step == 1
    assert len(warnings) == 1
    assert "step 2" in warnings[0]
    assert "gone" in warnings[0]


def test_a_folder_is_never_written_twice(store: Store) -> None:
    folder = write(store, 1)
    before = inspect(folder).manifest
    with pytest.raises(CheckpointError, match="is there already"):
        write(store, 1, attempt=2)
    assert inspect(folder).manifest == before
    store.begin(store.aside(2, 1))
    with pytest.raises(FileExistsError):
        store.begin(store.aside(2, 1))


@pytest.mark.parametrize("harm", ["missing", "shorter", "foreign"])
def test_what_is_not_whole_is_not_committed(store: Store, harm: str) -> None:
    """A rank may write to another disk by mistake, or somebody cleans up."""
    write(store, 1)
    aside = store.aside(2, 1)
    store.begin(aside)
    (aside / "first").write_bytes(b"1234" if harm != "shorter" else b"123")
    if harm == "foreign":
        (aside / "core").write_bytes(b"")
    files = {name: {"bytes": 4, "sha256": ""} for name in (NAMES if harm == "missing" else NAMES[:1])}
    with pytest.raises(CheckpointError, match="All ranks must write to one folder"):
        store.commit(aside, 2, {"step": 2, "metrics": {}, "files": files})
    assert steps(store) == [1]


def test_the_quarantine_keeps_the_last_that_came(store: Store) -> None:
    """Not those with the latest times: old checkpoints come, too, and a clock may be wrong."""
    for number in range(1, 8):
        folder = write(store, number)
        os.utime(folder, (1e9 - 1000 * number,) * 2)
        assert store.quarantine(folder, f"reason {number}").is_dir()
        assert store.folder.joinpath("quarantine").is_dir()
    held = sorted((store.folder / "quarantine").iterdir())
    assert [path.name for path in held] == [
        name for n in (5, 6, 7) for name in (f"{n:06d}_step_{n:08d}", f"{n:06d}_step_{n:08d}.txt")
    ]
    assert len(held) == 2 * QUARANTINE_KEEPS
    assert held[-1].read_text() == "reason 7\n"
    assert store.quarantine(write(store, 7), "again").name == "000008_step_00000007"


def test_repeated_kills_do_not_fill_the_disk(store: Store) -> None:
    write(store, 1)
    for attempt in range(1, 9):
        for step in (2, 3):
            aside = store.aside(step, attempt)
            store.begin(aside)
            (aside / "first").write_bytes(b"half")
        (store.folder / f".removing_step_00000000_{attempt}").mkdir()
        step, warnings = newest(store)
        assert step == 1
        assert len(warnings) == 2
    assert len([path for path in (store.folder / "quarantine").iterdir() if path.is_dir()]) == QUARANTINE_KEEPS
    assert sorted(path.name for path in store.folder.iterdir()) == ["latest.json", "quarantine", "step_00000001"]


def test_names_that_are_not_ours_are_left_alone(store: Store) -> None:
    write(store, 3)
    for name in ("step_9", "step_00000009.bak", "my_step_00000009", "latest"):
        (store.folder / name).mkdir()
    assert steps(store) == [3]
    assert newest(store) == (3, [])
    store.retain(1, best=False)
    assert len(list(store.folder.iterdir())) == 6


@pytest.mark.parametrize("kind", ["file", "empty", "digest"])
def test_what_only_looks_like_a_checkpoint_is_moved_away(store: Store, kind: str) -> None:
    write(store, 3)
    fake = store.folder / "step_00000009"
    fake.write_text("x") if kind == "file" else fake.mkdir()
    if kind == "digest":
        (fake / MANIFEST).write_text("[]")
        (fake / DIGEST).write_text(f"{hashlib.sha256(b'[]').hexdigest()}  {MANIFEST}\n")
    step, warnings = newest(store)
    assert step == 3
    assert len(warnings) == 1
    for _ in range(QUARANTINE_KEEPS):
        store.quarantine(write(store, 9), "another")
    assert len(list((store.folder / "quarantine").iterdir())) == 2 * QUARANTINE_KEEPS


def race(run: str, attempt: int) -> list[str]:
    trainer = Trainer(run, "single", attempt=attempt, keep=3)
    return [trainer.saved(step) for step in range(1, 31)]


def test_of_two_writers_one_is_stopped(tmp_path: Path) -> None:
    """Both save the same steps: what is there is always from one of them alone, and good."""
    writers = [Crew(race, 1, str(tmp_path / "run"), attempt) for attempt in (1, 2)]
    (error, first), (_, second) = [writer.outcomes(60)[0] for writer in writers]
    assert not error
    for one, other in zip(first, second, strict=True):
        assert "" in (one, other) or "not saved" in one + other or "could not" in one + other
        assert one == "" or one.startswith("CheckpointError"), one
    assert any(first + second), "they never met"
    store = Store(tmp_path / "run")
    assert steps(store)[0] == 30
    assert all(inspect(folder).state == "good" for _, folder in store.committed())
    assert store.unfinished() == []


def test_a_start_beside_a_living_run_costs_that_run_a_save_at_most(tmp_path: Path) -> None:
    """It takes what is being written for a leftover."""
    writer = Crew(race, 1, str(tmp_path / "run"), 1)
    store = Store(tmp_path / "run")
    starts = 0
    while writer.alive:
        if random.random() < 0.5:  # in the middle of a save, else at any time
            while writer.alive and not store.unfinished():
                time.sleep(0.001)
        starts += newest(store)[0] is not None
        time.sleep(random.uniform(0, 0.05))
    ((error, saves),) = writer.outcomes(60)
    assert not error
    assert starts
    assert any(saves), "no start met a save"
    assert all(save == "" or save.startswith("CheckpointError") for save in saves), saves
    assert newest(store)[0] == max(step for step, save in enumerate(saves, start=1) if not save)


def surplus(run: str) -> tuple[list[int], list[int]]:
    many = Trainer(run, "ddp", keep=5)
    for step in range(1, 6):
        assert many.saved(step) == ""
    few = Trainer(run, "ddp", keep=2)
    with watched(few.store.folder) as events:
        assert few.saved(6) == ""
    order = few.world.on_main(lambda: [int(name[-1]) for name in events if name.startswith(("-step_", "+step_"))])
    return order, steps(few.store)


def test_a_surplus_goes_before_room_is_needed(tmp_path: Path) -> None:
    """A kill before retention leaves one checkpoint too many, and the disk may not hold yet another."""
    for order, left in on_ranks(surplus, 2, str(tmp_path / "run")):
        assert order == [3, 2, 1, 6, 4]
        assert left == [6, 5]
