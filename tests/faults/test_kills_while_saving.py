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


def resumed(run: Path, rank: int) -> list[int]:
    """The steps from which the starts went on, as far as they came."""
    journal = run / f"digests_{rank}.txt"
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith("resumed")]


def starts(run: Path) -> list[int]:
    """Starts that went on, by rank."""
    return [len(resumed(run, rank)) for rank in (0, 1)]


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
    before = starts(run)
    crew = Crew(train_until_killed, 2, str(run), attempt)
    condition = moment(Moments(store, chance))
    if moment is not Moments.any_time:
        until(lambda: starts(run)[0] > before[0], crew)
    until(condition, crew)
    together = all(now > then for now, then in zip(starts(run), before, strict=True))
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
    hits, slowest, worst, in_flight = Counter[str](), 0.0, 0, 0
    for number in range(kills):
        hit, took = kill_once(run, number + 1, MOMENTS[number % len(MOMENTS)], chance)
        hits.update(hit)
        in_flight += bool(hit)
        slowest = max(slowest, took)
        committed = Store(run).committed()
        assert all(inspect(folder).state == "good" for _, folder in committed), "a kill damages nothing committed"
        assert len(committed) <= KEEP + 1
        trained = max((step for step, _ in digests(run / "digests_0.txt")), default=0)
        worst = max(worst, trained - (committed[0][0] if committed else 0))
    before, newest = starts(run)[0], committed[0][0]
    last = Crew(train_until_killed, 2, str(run), kills + 1)
    until(lambda: starts(run)[0] > before, last)
    until(lambda: Store(run).committed()[0][0] > newest, last)
    last.kill()
    last.outcomes(FASTER_THAN)
    begun = resumed(run, 0)
    print(
        f"\nkills: {kills}, of which {in_flight} hit a save {dict(hits)} and {kills + 1 - len(begun)} a start; "
        f"all other {len(begun)} starts went on by themselves, the last from step {begun[-1]}; most steps lost: "
        f"{worst}; the rank that was left ended within {slowest:.1f} s"
    )
    assert begun == sorted(begun), "no start fell back behind the one before it"
    assert begun[-1] == newest
    assert in_flight > kills / 3
    assert worst <= 2, "the step that was being trained and the one that was being saved"
