"""Damage to a checkpoint of two ranks, of every kind and to every file: always found, and the one before it used."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.saving import Trainer, save_steps
from tests.ranks import on_ranks
from toolkit.checkpoint.manifest import DIGEST, MANIFEST, inspect
from toolkit.checkpoint.restore import newest_good, verify_together
from toolkit.checkpoint.store import Store
from toolkit.errors import CheckpointError
from toolkit.world import world

STEPS = 3


def flip_bit(folder: Path, file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def truncate(folder: Path, file: Path, chance: random.Random) -> None:
    os.truncate(file, chance.randrange(file.stat().st_size))


def zero_range(folder: Path, file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    inside = chance.choice([index for index, byte in enumerate(content) if byte])
    start, end = chance.randint(0, inside), chance.randint(inside + 1, len(content))
    content[start:end] = bytes(end - start)
    file.write_bytes(content)


def zero_file(folder: Path, file: Path, chance: random.Random) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def lengthen(folder: Path, file: Path, chance: random.Random) -> None:
    with file.open("ab") as end:
        end.write(bytes(chance.randint(1, 9)))


def delete(folder: Path, file: Path, chance: random.Random) -> None:
    file.unlink()


def link(folder: Path, file: Path, chance: random.Random) -> None:
    twin = folder.parent / f"equal_to_{file.name}"
    file.replace(twin)
    file.symlink_to(twin)


def pipe(folder: Path, file: Path, chance: random.Random) -> None:
    file.unlink()
    os.mkfifo(file)


def make_folder(folder: Path, file: Path, chance: random.Random) -> None:
    file.unlink()
    file.mkdir()


def add_file(folder: Path, file: Path, chance: random.Random) -> None:
    (folder / f"{chance.choice(['.', 'x_', ''])}{chance.randrange(100)}{file.name}").write_bytes(file.read_bytes())


def swap(folder: Path, file: Path, chance: random.Random) -> None:
    """Two files of the same kind; in the manifest or its digest, a bit."""
    twins = sorted(other for other in folder.glob(f"*{file.suffix}") if other not in (file, folder / MANIFEST))
    if file.name in (MANIFEST, DIGEST):
        return flip_bit(folder, file, chance)
    assert len(twins) == 1
    content = file.read_bytes(), twins[0].read_bytes()
    assert content[0] != content[1]
    file.write_bytes(content[1])
    twins[0].write_bytes(content[0])
    return None


KINDS: list[Callable[[Path, Path, random.Random], None]] = [
    *(flip_bit, truncate, zero_range, zero_file, lengthen, delete, link, pipe, make_folder, add_file, swap)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("corruption") / "run"
    on_ranks(save_steps, 2, str(run), STEPS)
    assert [step for step, _ in Store(run).committed()] == [3, 2, 1]
    assert len(list((run / "checkpoints" / "step_00000003").iterdir())) == 6
    return run


def copied(run: Path, to: Path) -> Store:
    shutil.copytree(run, to)
    return Store(to)


def damages(number: int, seed: int) -> list[tuple[int, int, int]]:
    """Seed, kind and file of each; every kind meets every file in turn, the order is random."""
    pairs = [(kind, file) for kind in range(len(KINDS)) for file in range(6)]
    rounds = [(seed + index, *pairs[index % len(pairs)]) for index in range(number)]
    random.Random(seed).shuffle(rounds)
    return rounds


def damage(folder: Path, kind: int, file: int, seed: int) -> str:
    victim = sorted(folder.iterdir())[file]
    KINDS[kind](folder, victim, random.Random(seed))
    return f"{KINDS[kind].__name__} {victim.name} (seed {seed})"


@pytest.mark.parametrize(
    "number", [66, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["quick", "thousand"]
)
def test_every_corruption_is_caught(run: Path, tmp_path: Path, number: int) -> None:
    store, good = copied(run, tmp_path / "run"), run / "checkpoints"
    caught, missed, alone = Counter[str](), [], world()
    for seed, kind, file in damages(number, seed=0):
        name = damage(newest := store.folder / "step_00000003", kind, file, seed)
        warnings: list[str] = []
        found = (
            inspect(newest).state,
            bool(verify_together(newest, alone)[1]),
            (used := newest_good(store, alone, warnings.append)) and used.step,
            len(warnings),
        )
        if found == ("corrupt", True, 2, 1):
            caught[name.split()[0]] += 1
        else:
            missed.append((name, found, warnings))
        shutil.rmtree(store.folder / "quarantine", ignore_errors=True)
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(good / newest.name, newest)
    print(f"\ncorruptions caught: {caught.total()}/{number} {dict(caught)}")
    assert missed == []
    assert caught.total() == number
    assert inspect(store.folder / "step_00000002").state == "good"


def use_newest(run: str, good: str, rounds: list[tuple[int, int, int]]) -> list[tuple[str, int, int, int, str]]:
    """Rank 0 damages the newest one or two; all ranks look for the newest good one, and load it."""
    trainer = Trainer(run, keep=STEPS)
    results = []
    for seed, kind, file in rounds:
        broken = 1 + seed % 2

        def spoil(seed: int = seed, kind: int = kind, file: int = file, broken: int = broken) -> str:
            for name in ("quarantine", "step_00000003", "step_00000002"):
                shutil.rmtree(trainer.store.folder / name, ignore_errors=True)
            for name in ("step_00000003", "step_00000002"):
                shutil.copytree(Path(good, name), trainer.store.folder / name)
            names = [damage(trainer.store.folder / f"step_{3 - n:08d}", kind, file, seed + n) for n in range(broken)]
            return ", ".join(names)

        what = trainer.world.on_main(spoil)
        trainer.warnings.clear()
        found = trainer.resume()
        shelf = trainer.store.folder / "quarantine"
        inside = trainer.world.on_main(lambda shelf=shelf: len([p for p in shelf.iterdir() if p.suffix != ".txt"]))
        results.append((what, found.step if found else 0, len(trainer.warnings), inside, trainer.digest()))
    trainer.close()
    return results


@pytest.mark.parametrize(
    "number", [16, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["quick", "many"]
)
def test_two_ranks_agree_and_use_the_one_before(run: Path, tmp_path: Path, number: int) -> None:
    copied(run, tmp_path / "run")
    digests = on_ranks(save_steps, 2, str(tmp_path / "again"), STEPS)
    rounds = damages(number, seed=7)
    ranks = on_ranks(use_newest, 2, str(tmp_path / "run"), str(run / "checkpoints"), rounds, timeout=600)
    for rank, results in enumerate(ranks):
        for (seed, *_), (what, step, warned, inside, digest) in zip(rounds, results, strict=True):
            broken = 1 + seed % 2
            assert (step, warned, inside) == (3 - broken, broken, broken), what
            assert digest == digests[rank][step - 1], what
    both = sum(seed % 2 for seed, *_ in rounds)
    print(f"\non two ranks: {number}/{number} caught, {both} of them in the newest two")
    assert 0 < both < number


def test_where_all_are_damaged_there_is_none(run: Path, tmp_path: Path) -> None:
    store = copied(run, tmp_path / "run")
    for _, folder in store.committed():
        (folder / DIGEST).write_text("")
    warnings: list[str] = []
    assert newest_good(store, world(), warnings.append) is None
    assert len(warnings) == STEPS
    assert len([p for p in (store.folder / "quarantine").iterdir() if p.is_dir()]) == STEPS


def test_a_linked_folder_is_not_used(run: Path, tmp_path: Path) -> None:
    store = copied(run, tmp_path / "run")
    newest = store.folder / "step_00000003"
    newest.rename(tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    assert inspect(newest).state == "foreign"
    found = newest_good(store, world(), [].append)
    assert found
    assert found.step == 2
    assert inspect(tmp_path / "elsewhere", hashing=True).reason == ""


def look_without_rights(run: str) -> str:
    """Rank 1 may not read the files."""
    trainer = Trainer(run)
    if trainer.world.rank == 1:
        os.seteuid(65534)
    try:
        trainer.resume()
    except CheckpointError as error:
        return str(error)
    return "resumed"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights")
@pytest.mark.parametrize("what", ["folder", "files"])
def test_a_checkpoint_that_a_rank_may_not_read_is_not_damaged(run: Path, what: str) -> None:
    """Or missing rights, or a folder that one node does not see, would cost every checkpoint of the run."""
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)  # noqa: PTH101
        store = copied(run, Path(open_to_all, "run"))
        newest = store.folder / "step_00000003"
        for path in [newest] if what == "folder" else newest.iterdir():
            path.chmod(0o700)
        first, second = on_ranks(look_without_rights, 2, str(store.folder.parent))
        assert first == second
        assert "cannot be read by rank 1" in first
        assert "Permission denied" in first
        assert [step for step, _ in store.committed()] == [3, 2, 1]
        assert not (store.folder / "quarantine").exists()
