"""Saves that go on beside training: what they hold, what they leave alone, and how their errors come home."""

from __future__ import annotations

import json
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.saving import Trainer, mostly_frozen_bert
from tests.ranks import on_ranks
from toolkit.checkpoint.manifest import inspect
from toolkit.checkpoint.store import Store

STRATEGIES = ["ddp", "fsdp", "zero1"]


def train(run: str, steps: int, every: int) -> tuple[str, int]:
    """The digest after so many steps, of which many were taken while a big save was under way."""
    trainer = Trainer(run, "ddp", model=mostly_frozen_bert)
    during = 0
    for step in range(1, steps + 1):
        trainer.step(step)
        during += trainer.saver.busy
        if every and step % every == 0:
            trainer.save(step)
    trainer.saver.wait()
    digest = trainer.digest()
    trainer.close()
    return digest, during


@pytest.mark.slow
def test_a_save_does_not_touch_training(tmp_path: Path) -> None:
    """Its collectives go between those of many steps, which give the same bits as without."""
    alone = on_ranks(train, 2, str(tmp_path / "alone"), 60, 0)
    beside = on_ranks(train, 2, str(tmp_path / "beside"), 60, 20)
    assert [digest for digest, _ in beside] == [digest for digest, _ in alone]
    assert all(during > 10 for _, during in beside), beside
    print(f"\n{[during for _, during in beside]} of 60 steps were taken while a save was under way")
    assert [inspect(folder).state for _, folder in Store(tmp_path / "beside").committed()] == ["good", "good"]


def save_and_train_on(run: str, strategy: str) -> list[tuple[str, str]]:
    """Digests that must be equal."""
    trainer = Trainer(run, strategy)
    for step in range(1, 4):
        trainer.step(step)
    then = trainer.digest()
    trainer.save(3)
    for shard in trainer.strategy.shards().values():
        shard.data.add_(1)  # at once: whatever is copied later shows it
    spoiled = trainer.digest()
    trainer.saver.wait()
    trainer.resume()
    loaded = trainer.digest()
    for step in range(4, 9):
        trainer.step(step)
    after = trainer.digest()
    trainer.resume()
    trainer.save(4)
    for step in range(4, 9):
        trainer.step(step)
    beside = trainer.digest()
    trainer.saver.wait()
    found = trainer.resume()
    assert found
    assert found.step == 4
    again = trainer.digest()
    trainer.close()
    assert len({then, spoiled, after}) == 3
    return [(loaded, then), (beside, after), (again, then)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_saved_is_the_state_of_that_moment(tmp_path: Path, strategy: str) -> None:
    for pairs in on_ranks(save_and_train_on, 2, str(tmp_path / "run"), strategy):
        assert [one == other for one, other in pairs] == [True] * 3


def poison(run: str, strategy: str, name: str, value: float) -> tuple[str, bool, str, list[int], bool]:
    """One number is no number, then is one again: of one rank, or of each where all hold it."""
    trainer = Trainer(run, strategy)
    trainer.step(1)
    assert trainer.saved(1) == ""
    names = sorted(key for key in trainer.strategy.shards() if key.startswith(name))
    element = trainer.strategy.shards()[names[0]].data[-1:]
    before = element.clone()
    if trainer.world.rank == 1 or strategy == "ddp":
        element.fill_(value)
    trainer.save(2)
    while trainer.saver.busy:
        time.sleep(0.001)
    failed, raised = trainer.saver.failed, trainer.saved(3)  # the next save says it
    unfinished = bool(trainer.world.on_main(trainer.store.unfinished))
    element.copy_(before)
    after = trainer.saved(4)
    steps = trainer.world.on_main(lambda: [step for step, _ in trainer.store.committed()])
    trainer.close()
    return raised, failed, after, steps, unfinished


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(("strategy", "name"), [("fsdp", "weights/"), ("zero1", "exp_avg_sq/"), ("ddp", "exp_avg/")])
def test_poison_is_not_saved(tmp_path: Path, strategy: str, name: str, value: float) -> None:
    first, second = on_ranks(poison, 2, str(tmp_path / "run"), strategy, name, value)
    assert first == second
    raised, failed, after, steps, unfinished = first
    assert failed
    assert raised.startswith("NumericsError: at step 2 1 tensors are not finite")
    assert name in raised
    assert after == ""
    assert steps == [4, 1]
    assert not unfinished


def fail_on_one(run: str, how: str) -> tuple[list[str], list[str]]:
    """Rank 1 cannot write what it has; the others could. Then it can."""
    trainer = Trainer(run)
    rank_state: dict[str, Any] = {"rng": "…"}
    if trainer.world.rank == 1 and how == "no JSON":
        rank_state["oops"] = {1, 2}
    if trainer.world.rank == 1 and how == "file too large":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    raised = []
    for _ in range(2):
        trainer.saver.save(trainer.manifest(1), rank_state)
        try:
            trainer.saver.wait()
            raised.append("")
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        rank_state.pop("oops", None)
    left = trainer.world.on_main(lambda: sorted(path.name for path in trainer.store.folder.iterdir()))
    trainer.close()
    return raised, left


@pytest.mark.parametrize(
    ("how", "cause"), [("no JSON", "TypeError on rank 1"), ("file too large", "OSError on rank 1: [Errno 27]")]
)
def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path, how: str, cause: str) -> None:
    first, second = on_ranks(fail_on_one, 2, str(tmp_path / "run"), how, timeout=30)
    assert first == second
    raised, left = first
    assert raised[0].startswith("CheckpointError: the checkpoint of step 1 could not be saved: ")
    assert cause in raised[0]
    assert raised[1] == ""
    assert left == ["latest.json", "step_00000001"]


def save_and_see_errors(run: str) -> list[str]:
    """An error is raised once, by whichever of `save` and `wait` comes first; then saving goes on."""
    trainer = Trainer(run)
    assert trainer.saved(1) == ""
    trainer.saver.save(trainer.manifest(1), {"rng": "…"})  # is there already
    raised = [trainer.saved(2)]
    raised += [trainer.saved(step) for step in (2, 3)]
    trainer.saver.wait()
    trainer.close()
    return raised


def test_an_error_comes_with_the_next_save(tmp_path: Path) -> None:
    for first, second, third in on_ranks(save_and_see_errors, 2, str(tmp_path / "run")):
        assert "is there already" in first
        assert first.startswith("CheckpointError: ")
        assert (second, third) == ("", "")


def measure_pauses(run: str) -> tuple[float, float, float]:
    """The longest pause of this thread while a big save is under way, and the stall and the time of the save."""
    trainer = Trainer(run, "single", model=mostly_frozen_bert, keep=1)
    pauses = []
    for step in range(1, 5):
        trainer.save(step)
        last, longest = time.perf_counter(), 0.0
        while trainer.saver.busy:
            time.sleep(0.0002)
            now = time.perf_counter()
            last, longest = now, max(longest, now - last)
        trainer.saver.wait()
        pauses.append(longest)
    timings = trainer.saver.timings
    trainer.close()
    return min(pauses), min(t.stall for t in timings), min(t.total for t in timings)


def test_training_is_not_held_up(tmp_path: Path) -> None:
    """Nobody who writes 134 MB may hold the interpreter's lock meanwhile. The best of four: the machine is shared."""
    ((pause, stall, total),) = on_ranks(measure_pauses, 1, str(tmp_path / "run"))
    print(f"\nlongest pause {1e3 * pause:.1f} ms, stall {1e3 * stall:.1f} ms, of {1e3 * total:.0f} ms")
    assert pause < 0.03
    assert stall < 0.04


def save_synchronously(run: str) -> tuple[float, bool, int, str]:
    trainer = Trainer(run, asynchronous=False)
    stall = trainer.save(1)
    busy = trainer.saver.busy
    trainer.saver.save(trainer.manifest(2), {"rng": "…"})
    try:
        trainer.save(2)
    except Exception as error:
        return stall, busy, len(trainer.store.committed()), f"{type(error).__name__}: {error}"
    return stall, busy, 0, ""


def save_in_place(run: str, strategy: str) -> tuple[bool, bool, bool]:
    """Whether what is saved is the engine's own memory, if training waits; and what a save after that one holds."""
    trainer = Trainer(run, strategy, asynchronous=False)
    copying = Trainer(run, strategy)
    for step in range(1, 3):
        trainer.step(step)
        trainer.save(step)
    then = trainer.digest()
    own, copied = ({shard.data.data_ptr() for shard in one.saver._staged.values()} for one in (trainer, copying))
    held = {shard.data.data_ptr() for one in (trainer, copying) for shard in one.strategy.shards().values()}
    trainer.step(3)
    trainer.resume()
    loaded = trainer.digest()
    copying.strategy.teardown()
    trainer.close()
    return own <= held, bool(copied & held), loaded == then


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_save_that_training_waits_for_holds_no_copy(tmp_path: Path, strategy: str) -> None:
    found = on_ranks(save_in_place, 2, str(tmp_path / "run"), strategy)
    assert found == [(True, False, True)] * 2


def test_a_save_that_is_not_asynchronous_is_done_when_it_returns(tmp_path: Path) -> None:
    for stall, busy, committed, raised in on_ranks(save_synchronously, 2, str(tmp_path / "run")):
        assert stall > 0.001
        assert not busy
        assert committed == 2
        assert "is there already" in raised


def test_the_files_are_safetensors(tmp_path: Path) -> None:
    """Read by their own library, with the widths of types aligned."""
    from safetensors.torch import load_file

    from toolkit.checkpoint.tensors import read_tensors, write_tensors
    from toolkit.strategies.state import FlatShard

    types = (torch.bool, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.float16, torch.float32)
    shards = {
        f"weights/{index} ü": FlatShard((torch.arange(5) % 2).to(dtype), 0, (5,)) for index, dtype in enumerate(types)
    }
    written = write_tensors(tmp_path, shards, 0)
    (name,) = written
    content = (tmp_path / name).read_bytes()
    assert len(content) == written[name][0]
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for entry in (value for key, value in header.items() if key != "__metadata__"):
        begin, end = entry["data_offsets"]
        assert (begin % ((end - begin) // 5)) == 0
    found = load_file(tmp_path / name)
    assert all(
        torch.equal(found[key], shard.data) and found[key].dtype == shard.data.dtype for key, shard in shards.items()
    )
    into = {key: FlatShard(torch.zeros_like(shard.data), 0, (5,)) for key, shard in shards.items()}
    read_tensors(tmp_path, into)
    assert all(torch.equal(into[key].data, shard.data) for key, shard in shards.items())


def test_a_folder_that_was_taken_away_is_not_made_again(tmp_path: Path) -> None:
    """A start that took over has put it in quarantine, while the process that writes to it was stopped."""
    from toolkit.checkpoint.tensors import write_tensors
    from toolkit.strategies.state import FlatShard

    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "gone", {"weights": FlatShard(torch.ones(5), 0, (5,))}, 0)
    assert not (tmp_path / "gone").exists()
