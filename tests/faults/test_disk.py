"""Disks that are full, read-only or cleaned up while a checkpoint is written: on a real small tmpfs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.saving import Crew, SmallDisk, Trainer, can_mount, leave_free, watched
from tests.ranks import on_ranks
from toolkit.checkpoint.manifest import MANIFEST, inspect
from toolkit.checkpoint.restore import newest_good
from toolkit.checkpoint.store import Store
from toolkit.world import world

UNTOUCHED = "The checkpoints before it are untouched"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if not can_mount():
        pytest.skip("neither root nor a user namespace may mount a tmpfs here")
    disk = SmallDisk(tmp_path / "disk", "4m")
    yield disk
    disk.close()


def good_steps(store: Store) -> list[int]:
    return [step for step, folder in store.committed() if inspect(folder).state == "good"]


def fill_and_save(disk: str) -> tuple[list[tuple[str, list[int], int]], str, list[int], str, bool]:
    """Saves with ever more room, from none to one page too few; then with enough."""
    trainer = Trainer(Path(disk, "run"), keep=1)
    assert trainer.saved(1) == ""
    room = os.statvfs(disk).f_bavail
    assert trainer.saved(2) == ""
    # What a save takes at its height; the pointer beside the old one may be lacking.
    whole = sum(-(-path.stat().st_size // 4096) for path in (trainer.store.folder / "step_00000002").iterdir())
    assert abs(os.statvfs(disk).f_bavail - room) <= 1, "retention gives the room back"
    tries, step = [], 3
    for free in (0, 1, whole // 3, whole // 2, whole - 12, *range(whole - 8, whole)):
        trainer.step(step)
        trainer.world.on_main(lambda free=free: leave_free(Path(disk), free))
        raised = trainer.saved(step)
        left = trainer.world.on_main(lambda: (good_steps(trainer.store), len(trainer.store.unfinished())))
        tries.append((raised, *left))
        step += 1
    trainer.world.on_main(lambda: leave_free(Path(disk), whole))
    trainer.step(step)
    after = trainer.saved(step)
    digest, left = trainer.digest(), trainer.world.on_main(lambda: good_steps(trainer.store))
    trainer.step(step + 1)
    found = trainer.resume()
    same = found is not None and found.step == step and trainer.digest() == digest
    trainer.close()
    return tries, after, left, f"{step}", same


def test_a_full_disk(disk: SmallDisk) -> None:
    first, second = on_ranks(fill_and_save, 2, str(disk.path))
    assert first == second, "all ranks hear the same"
    tries, after, left, step, same = first
    newest = 2
    for number, (raised, good, unfinished) in enumerate(tries, start=3):
        assert raised.startswith("CheckpointError: "), (number, raised)
        assert f"step {number} could not be saved" in raised
        assert "No space left on device" in raised
        assert UNTOUCHED in raised
        assert good, "the one before is there"
        assert good[0] >= newest, "nothing that was committed is lost"
        assert unfinished == 0, "the room comes back"
        newest = good[0]
    assert after == ""
    assert left == [int(step)]
    assert same
    places = {place for raised, *_ in tries for place in ("shard_", "rank_", MANIFEST) if place in raised}
    assert places == {"shard_", "rank_", MANIFEST}, "the message names the file"
    print(f"\ndisk full: {len(tries)} saves failed, in {sorted(places)}; the next one succeeded")


def test_a_disk_that_is_full_at_a_start(disk: SmallDisk, tmp_path: Path) -> None:
    """What is unfinished is put aside, what is good is found."""
    on_ranks(save_one, 1, str(disk.path / "run"))
    store = Store(disk.path / "run")
    aside = store.aside(2, 1)
    store.begin(aside)
    (aside / "shard_00001.safetensors").write_bytes(bytes(10))
    leave_free(disk.path, 0)
    warnings: list[str] = []
    found = newest_good(store, world(), warnings.append)
    assert found
    assert found.step == 1
    assert len(warnings) == 1
    assert store.unfinished() == []


def save_one(run: str) -> str:
    trainer = Trainer(run, "single" if world().size == 1 else "fsdp")
    raised = trainer.saved(1)
    trainer.close()
    return raised


def save_while_told(run: str, orders: str) -> list[str]:
    """Saves 1; 2 when the disk is read-only; 3 when it is not."""
    trainer = Trainer(run)
    results = []
    for step in (1, 2, 3):
        trainer.world.on_main(lambda step=step: wait_for(Path(orders, f"go_{step}")))
        results.append(trainer.saved(step))
        trainer.world.on_main(lambda step=step: Path(orders, f"done_{step}").touch())
    trainer.close()
    return results


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.005)


def test_a_disk_that_becomes_read_only(disk: SmallDisk, tmp_path: Path) -> None:
    crew = Crew(save_while_told, 2, str(disk.path / "run"), str(tmp_path))
    for step, read_only in ((1, False), (2, True), (3, False)):
        disk.read_only(read_only)
        (tmp_path / f"go_{step}").touch()
        wait_for(tmp_path / f"done_{step}")
    (_, first), (_, second) = crew.outcomes(60)
    assert first == second
    assert first[0] == first[2] == ""
    assert first[1].startswith("CheckpointError: ")
    assert "Read-only file system" in first[1]
    assert UNTOUCHED in first[1]
    assert good_steps(Store(disk.path / "run")) == [3, 1]


def save_many(run: str, last: int) -> list[str]:
    trainer = Trainer(run, keep=3)
    results = []
    for step in range(1, last + 1):
        trainer.step(step)
        results.append(trainer.saved(step))
    trainer.close()
    return results


@pytest.mark.parametrize("victim", ["what is being written", "everything"])
def test_a_folder_that_is_deleted_while_it_is_written(tmp_path: Path, victim: str) -> None:
    """The save fails on all ranks alike, and the next one goes well."""
    store = Store(tmp_path / "run")
    crew = Crew(save_many, 2, str(tmp_path / "run"), 24)
    deleted = 0
    while crew.alive:
        for aside in store.unfinished():
            number = int(aside.name.split("_")[2])
            if number % 4 == 0 and number < 24:
                shutil.rmtree(aside if victim != "everything" else store.folder, ignore_errors=True)
                deleted += 1
        time.sleep(0.0005)
    (error, first), (_, second) = crew.outcomes(60)
    assert not error
    assert first == second
    failed = {step: text for step, text in enumerate(first, start=1) if text}
    print(f"\ndeleted {deleted} times, {len(failed)} saves failed")
    assert failed
    assert all(text.startswith("CheckpointError: ") and f"{step:d}" in text for step, text in failed.items()), failed
    assert set(failed) <= {4, 8, 12, 16, 20, 24}
    found = newest_good(store, world(), [].append)
    assert found
    assert found.step == 24


def save_under_watch(run: str) -> list[str]:
    trainer = Trainer(run, keep=1)
    assert trainer.saved(1) == ""
    with watched(trainer.store.folder) as events:
        for step in range(2, 7):
            trainer.step(step)
            trainer.save(step)
        trainer.saver.wait()
    trainer.close()
    return events


def test_the_old_one_goes_after_the_new_one_is_committed(tmp_path: Path) -> None:
    """In the order in which the kernel saw it; and seen from outside, there is always a whole one."""
    run = tmp_path / "run"
    crew = Crew(save_under_watch, 2, str(run))
    looks = 0
    seen = False
    while crew.alive:
        if run.joinpath("checkpoints").is_dir():
            # The names are read in one go; what has gone since was there when its successor was.
            names = [name for name in os.listdir(run / "checkpoints") if name.startswith("step_")]  # noqa: PTH208
            assert names or not seen, "a moment without a checkpoint"
            seen |= bool(names)
            looks += seen
    (error, events), _ = crew.outcomes(60)
    assert not error
    assert looks > 20
    order = [event for event in events if event[1:].startswith(("step_", "latest"))]
    steps = range(2, 7)
    assert order == [event for n in steps for event in (f"+step_{n:08d}", "+latest.json", f"-step_{n - 1:08d}")], events
