"""Moments in 8 bits: under every strategy, near the numbers of fp32, and through checkpoints to the bit."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest

from tests.parity.job import Job, Outcome, train
from tests.parity.state import Stage, joined
from tests.parity.test_parity import BOUNDS as PLAIN
from tests.parity.test_parity import LAYOUTS, check_engine, check_samples, difference
from tests.parity.test_state import differing, run
from tests.ranks import on_ranks
from toolkit.config import AdapterConfig
from toolkit.strategies import Layout

NETWORK = "wide bert"
"""Whose matrices are large enough for 8 bits."""
BOUNDS = PLAIN["fp32"] | {"weights": 1e-4}
"""From one process with the same optimizer: a gradient that differs in its last bit may be rounded to the next of the
256 values."""


@functools.cache
def alone(optimizer: str) -> Outcome:
    return on_ranks(train, 1, Job(network=NETWORK, optimizer=optimizer))[0]  # type: ignore[arg-type]


def test_one_process_learns_as_with_fp32() -> None:
    low, full = alone("adamw-8bit"), alone("adamw")
    assert low.effective["optimizer"] == "LowBitAdamW"
    assert set(low.effective["moment_bits"]) == {8, 32}
    found = difference(low, full, NETWORK)
    assert 0 < found["loss"] < 1e-3
    assert 1e-3 < found["way"] < 0.1


@pytest.mark.parametrize(("name", "layout"), LAYOUTS[1:], ids=[f"{name}x{one.ranks}" for name, one in LAYOUTS[1:]])
def test_parity(name: str, layout: Layout, record_property: pytest.RecordProperty) -> None:
    job = Job(name, dict(layout.options), network=NETWORK, optimizer="adamw-8bit")
    outcomes = on_ranks(train, layout.ranks, job)
    found = difference(outcomes[0], alone("adamw-8bit"), NETWORK)
    for figure, value in found.items():
        record_property(figure, value)
    assert {figure: value for figure, value in found.items() if value > BOUNDS[figure]} == {}
    assert all({8, 32} == set(outcome.effective["moment_bits"]) for outcome in outcomes)
    check_engine(name, layout, outcomes, 1)
    check_samples(outcomes)


def test_an_adapter_on_low_bits() -> None:
    adapter = AdapterConfig(name="lora", rank=64, targets=("query", "value"))
    one, two = (
        on_ranks(train, ranks, Job(name, network=NETWORK, optimizer="adamw-8bit", adapter=adapter, quantization="nf4"))[
            0
        ]
        for name, ranks in (("single", 1), ("fsdp", 2))
    )
    for figure in ("losses", "grad_norms"):
        assert getattr(two, figure) == pytest.approx(getattr(one, figure), rel=1e-5)
    assert set(two.effective["moment_bits"]) == {8, 32}
    assert one.losses[-1] < one.losses[0]
    assert 0 < two.share_of_packed < 0.6


@pytest.mark.parametrize("name", ["single", "fsdp", "zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_going_on_is_exact(name: str, tmp_path: Path) -> None:
    """Two steps, a checkpoint, two more: losses and state of four steps at once."""
    place = name, 1 if name == "single" else 2, None
    whole, half, rest = (tmp_path / part for part in ("whole", "half", "rest"))
    kind = Stage("", {}, width=64, optimizer="adamw-8bit")
    losses = run(place, _steps(kind, 0, 4), "", whole)
    first = run(place, _steps(kind, 0, 2), "", half)
    assert first + run(place, _steps(kind, 2, 4), str(half), rest) == losses
    assert differing(rest, whole) == []


def test_a_checkpoint_is_that_of_any_adamw(tmp_path: Path) -> None:
    """What 8 bits have left goes to fp32 as it is, and from there to another number of ranks in 8 bits, nearly."""
    low, full, again = (tmp_path / part for part in ("low", "full", "again"))
    kind = Stage("", {}, width=64, optimizer="adamw-8bit")
    run(("ddp", 2, None), _steps(kind, 0, 3), "", low)
    run(("single", 1, None), Stage("", {}, width=64), str(low), full)
    assert differing(full, low) == []
    run(("fsdp", 3, None), kind, str(full), again)
    there, here = joined(full), joined(again)
    assert there.keys() == here.keys()
    for name, values in there.items():
        assert abs(here[name] - values).max() <= 0.02 * abs(values).max(), name


def _steps(stage: Stage, first: int, last: int) -> Stage:
    return dataclasses.replace(stage, steps=(first, last))
