"""SIGKILL while checkpoints are written: the next start always goes on by itself, to the last bit."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.saving import Crew, Trainer
from toolkit.checkpoint.manifest import MANIFEST, inspect
from toolkit.checkpoint.store import REMOVING, Store

KEEP = 2
FASTER_THAN = 10.0
"""Seconds in which the rank that is left must have noticed and ended."""


def train_until_killed(run: str, attempt: int) -> None:
    """Goes on from what is there, and saves every step; notes each digest before it is saved."""
    trainer = Trainer(run, attempt=attempt, keep=KEEP)
    journal = Path(run, f"digests_{trainer.world.rank}.txt")
    found = trainer.resume()
    step = found.step if found else 0
    known = dict(digests(journal))
    if found:
        assert trainer.digest() == known[step], f"step {step} is not what was saved"
    with journal.open("a") as notes:
        print(f"resumed {step}", file=notes, flush=True)
        while True:
            step += 1
            trainer.step(step)
            digest = trainer.digest()
            assert known.get(step, digest) == digest, f"step {step} is not what it was before the kill"
            print(f"{step} {digest}", file=notes, flush=True)
            trainer.save(step)


def digests(journal: Path) -> list[tuple[int, str]]:
    """What was noted of each step; a kill may have cut the last line."""
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    return [(int(step), digest) for step, digest in (line.split() for line in lines) if step != "resumed"]


def resumed(journal: Path) -> list[int]:
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("resumed")]


class Moments:
    """When to kill, as seen from outside."""

    def __init__(self, store: Store, chance: random.Random) -> None:
        self.store = store
        self.chance = chance

    def any_time(self) -> Callable[[], bool]:
        """From the start, which takes about half a second, into the training."""
        return self._after(self.chance.uniform(0, 1.5))

    def while_saving(self) -> Callable[[], bool]:
        """One of the next saves, somewhere in it."""
        skipped, delay = self.chance.randrange(4), self.chance.uniform(0, 0.03)
        seen: set[Path] = set()

        def now() -> bool:
            seen.update(self.store.unfinished())
            if len(seen) > skipped:
                time.sleep(delay)
            return len(seen) > skipped

        return now

    def in_a_file(self) -> Callable[[], bool]:
        return lambda: any(not (aside / MANIFEST).exists() and any(aside.iterdir()) for aside in self._asides())

    def with_a_manifest(self) -> Callable[[], bool]:
        return lambda: any((aside / MANIFEST).exists() for aside in self._asides())

    def before_the_pointer(self) -> Callable[[], bool]:
        return lambda: any(step > (self.store.pointer() or step) for step, _ in self.store.committed()[:1])

    def while_removing(self) -> Callable[[], bool]:
        return lambda: any(self.store.folder.glob(f"{REMOVING}*"))

    def _asides(self) -> list[Path]:
        return self.store.unfinished()

    def _after(self, seconds: float) -> Callable[[], bool]:
        end = time.monotonic() + seconds
        return lambda: time.monotonic() > end


MOMENTS = [
    *(Moments.any_time, Moments.while_saving, Moments.in_a_file),
    *(Moments.with_a_manifest, Moments.before_the_pointer, Moments.while_removing),
]


def until(condition: Callable[[], bool], crew: Crew) -> None:
    end = time.monotonic() + 60
    while not quietly(condition):
        assert crew.alive, crew.outcomes(5)
        assert time.monotonic() < end, "waited in vain"


def quietly(condition: Callable[[], bool]) -> bool:
    """Folders come and go while they are looked at."""
    try:
        return condition()
    except FileNotFoundError:
        return False


def left_behind(store: Store) -> list[str]:
    """What the kill hit."""
    hit = []
    for aside in store.unfinished():
        hit.append("with a manifest" if (aside / MANIFEST).exists() else "in the files")
    newest = store.committed()[:1]
    if newest and newest[0][0] != store.pointer():
        hit.append("before the pointer")
    if any(store.folder.glob(f"{REMOVING}*")):
        hit.append("while removing")
    return hit


def kill_once(run: Path, attempt: int, moment: Any, chance: random.Random) -> tuple[list[str], float]:
    """One start, one kill of one rank or all; what it hit, and the seconds after which all had ended."""
    store = Store(run)
    before = max(len(resumed(run / f"digests_{rank}.txt")) for rank in (0, 1))
    crew = Crew(train_until_killed, 2, str(run), attempt)
    condition = moment(Moments(store, chance))
    if moment is not Moments.any_time:
        until(lambda: len(resumed(run / "digests_0.txt")) > before, crew)
    until(condition, crew)
    print("K", moment.__name__, attempt, flush=True)
    together = all(len(resumed(run / f"digests_{rank}.txt")) > before for rank in (0, 1))
    # One that has not met the others yet is waited for; whoever starts the ranks ends them then.
    victims = chance.choice([(), (0,), (1,)]) if together else ()
    crew.kill(*victims)
    killed = time.monotonic()
    outcomes = crew.outcomes(FASTER_THAN)
    took = time.monotonic() - killed
    for rank, (error, _) in enumerate(outcomes):
        assert error
        if rank in victims or not victims:
            assert error == "died", error
        assert "is not what" not in error, error
    return left_behind(store), took


@pytest.mark.parametrize(
    "kills", [10, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])], ids=["ten", "two_hundred"]
)
def test_every_kill_is_survived(tmp_path: Path, kills: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    chance = random.Random(11)
    hits, slowest, worst, ready = Counter[str](), 0.0, 0, 0
    in_flight = 0
    for number in range(kills):
        hit, took = kill_once(run, number + 1, MOMENTS[number % len(MOMENTS)], chance)
        hits.update(hit)
        in_flight += bool(hit)
        slowest = max(slowest, took)
        # What the next start will find: looked at with other eyes before it is started.
        trained = max((step for step, _ in digests(run / "digests_0.txt")), default=0)
        good = [step for step, folder in Store(run).committed() if inspect(folder).state == "good"]
        assert [step for step, _ in Store(run).committed()] == good, "nothing that is committed is damaged by a kill"
        assert len(good) <= KEEP + 1
        worst = max(worst, trained - max(good, default=0))
        # A kill while it starts leaves no note; any other start has noted from where it goes on.
        ready += 1
    last = Crew(train_until_killed, 2, str(run), kills + 1)
    starts = len(resumed(run / "digests_0.txt"))
    newest = Store(run).committed()[0][0]
    until(lambda: len(resumed(run / "digests_0.txt")) > starts, last)
    until(lambda: Store(run).committed()[0][0] > newest, last)
    last.kill()
    last.outcomes(FASTER_THAN)
    begun = resumed(run / "digests_0.txt")
    print(
        f"\nkills: {kills}, of which {in_flight} hit a save in flight ({dict(hits)}); resumed without help: {ready}; "
        f"steps trained: {begun[-1]}; most steps lost: {worst}; the rank that was left ended within {slowest:.1f} s"
    )
    assert begun == sorted(begun), "no start fell back behind the one before it"
    assert begun[-1] == newest
    assert in_flight > kills / 3
    assert worst <= 2, "the step that was being trained and the one that was being saved"
