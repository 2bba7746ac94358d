"""The training state passes from any strategy and number of ranks to any other: every tensor, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.parity.state import Stage, joined, pass_on
from tests.ranks import on_ranks

TAUGHT = 3
"""Steps that the state has behind it."""
Place = tuple[str, int, int | None]
"""Strategy, ranks, and ranks that share one copy of the model."""
PLACES: list[Place] = [
    ("single", 1, None),
    ("ddp", 2, None),
    ("fsdp", 3, None),
    ("zero1", 2, None),
    ("zero2", 3, None),
    ("zero3", 2, None),
    ("fsdp", 4, 2),
    ("zero3", 4, None),
]


def run(place: Place, stage: Stage, source: str, target: Path) -> list[float]:
    name, ranks, shard_size = place
    options = {} if shard_size is None else {"shard_size": shard_size}
    return on_ranks(pass_on, ranks, dataclasses.replace(stage, strategy=name, options=options), source, str(target))[0]


def blank(precision: str = "fp32", frozen: str = "") -> Stage:
    return Stage("", {}, precision, frozen=frozen)


def taught(place: Place, precision: str, folder: Path) -> Path:
    """A state with moments, and weights that are not those that every run begins with."""
    target = folder / "taught"
    run(place, dataclasses.replace(blank(precision), steps=(0, TAUGHT)), "", target)
    return target


def differing(ours: Path, theirs: Path) -> list[str]:
    found, expected = joined(ours), joined(theirs)
    return sorted(found.keys() ^ expected.keys()) + [
        name
        for name in found.keys() & expected.keys()
        if found[name].dtype != expected[name].dtype or found[name].tobytes() != expected[name].tobytes()
    ]


def check_chain(places: Sequence[Place], stage: Stage, start: Path, expected: Path, folder: Path) -> None:
    """Each reads what the one before it has written, and writes it again at once."""
    source = start
    for number, place in enumerate(places):
        target = folder / f"{number:03d}"
        run(place, stage, str(source), target)
        assert differing(target, expected) == [], f"from {places[number - 1] if number else 'the start'} to {place}"
        source = target


def every_pair(places: Sequence[Place]) -> list[Place]:
    """A round trip in which each follows each other one exactly once (an Eulerian circuit, by Hierholzer)."""
    left = {place: [other for other in places if other != place] for place in places}
    path, trip = [places[0]], []
    while path:
        if left[path[-1]]:
            path.append(left[path[-1]].pop())
        else:
            trip.append(path.pop())
    return trip[::-1]


def test_every_pair_is_on_the_round_trip() -> None:
    trip = every_pair(PLACES)
    pairs = list(itertools.pairwise(trip))
    assert len(pairs) == len(set(pairs)) == len(PLACES) * (len(PLACES) - 1)


def test_what_a_state_holds(tmp_path: Path) -> None:
    state = joined(taught(("fsdp", 2, None), "fp32", tmp_path))
    kinds = {name.partition("/")[0] for name in state}
    assert kinds == {"weights", "exp_avg", "exp_avg_sq", "step"}
    assert all(tensor.tolist() == [TAUGHT] for name, tensor in state.items() if name.startswith("step/"))
    assert all(tensor.dtype == np.float32 for tensor in state.values())
    assert sum(np.any(tensor != 0) for name, tensor in state.items() if name.startswith("exp_avg")) > 70


@pytest.mark.parametrize(
    ("precision", "places"),
    [("fp32", PLACES[1::2]), pytest.param("bf16", PLACES, marks=pytest.mark.slow)],
    ids=["fp32", "bf16"],
)
def test_from_one_to_the_next(precision: str, places: list[Place], tmp_path: Path) -> None:
    start = taught(("zero2", 2, None), precision, tmp_path)
    check_chain(places, blank(precision), start, start, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_each_to_each(tmp_path: Path) -> None:
    start = taught(("ddp", 2, None), "fp32", tmp_path)
    check_chain(every_pair(PLACES), blank(), start, start, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["bert.embeddings", "classifier"])
def test_frozen_weights_are_those_of_the_state(frozen: str, tmp_path: Path) -> None:
    """They were trained before, so that whoever writes the model's own is found out; and they lose their moments."""
    start, stage = taught(("fsdp", 2, None), "fp32", tmp_path), blank(frozen=frozen)
    expected = tmp_path / "expected"
    run(PLACES[0], stage, str(start), expected)
    assert {name.partition("/")[0] for name in set(joined(start)) - set(joined(expected))} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    assert not set(differing(expected, start)) & set(joined(expected))
    check_chain(PLACES, stage, start, expected, tmp_path)


@pytest.mark.slow
def test_frozen_weights_are_in_force(tmp_path: Path) -> None:
    start = taught(("fsdp", 2, None), "fp32", tmp_path)
    check_next_losses(PLACES, blank(frozen="bert.embeddings"), start, tmp_path, 1e-6)


@pytest.mark.parametrize(
    "places", [PLACES[:1] + PLACES[2:3], pytest.param(PLACES, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_the_next_loss_is_the_same_everywhere(places: list[Place], tmp_path: Path) -> None:
    start = taught(("zero3", 2, None), "fp32", tmp_path)
    check_next_losses(places, blank(), start, tmp_path, 1e-6)


@pytest.mark.slow
def test_the_next_loss_in_bf16(tmp_path: Path) -> None:
    start = taught(("zero3", 2, None), "bf16", tmp_path)
    check_next_losses(PLACES, blank("bf16"), start, tmp_path, 1e-2)


def check_next_losses(places: Sequence[Place], stage: Stage, start: Path, folder: Path, tolerance: float) -> None:
    """Of the next two steps: the second shows that the moments were in force."""
    stage = dataclasses.replace(stage, steps=(TAUGHT, TAUGHT + 2))
    losses = [run(place, stage, str(start), folder / f"next {n}") for n, place in enumerate(places)]
    for place, found in zip(places, losses, strict=True):
        assert found == pytest.approx(losses[0], rel=tolerance), place
