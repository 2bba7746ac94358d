"""The same numbers under every strategy: losses, gradient norms and weights equal those of one process.

Strategies enrol by themselves, with the layouts that their classes name.
"""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest
import torch

from tests.parity.job import GLOBAL_BATCH, RAGGED, SAMPLES, STEPS, Job, Outcome, make, tiny_bert, train
from tests.ranks import on_ranks
from toolkit.engine import seed_all
from toolkit.strategies import STRATEGIES, Layout

LAYOUTS = [(name, layout) for name, kind in STRATEGIES.items() for layout in kind.layouts[name]]
SHARDED = {"fsdp", "zero1", "zero2", "zero3"}

# fp32: sums in another order differ in the last bits. bf16 rounds each product to 8 significant bits (unit roundoff
# 2**-9), and what is added up in another order is rounded in other places. So a loss may move by one roundoff, a
# gradient norm, which sums squares of rounded terms, by ten; and of the way that the weights have gone, Adam, whose
# first steps are the signs of gradients, may turn a tenth.
BOUNDS = {
    "fp32": {"loss": 1e-5, "grad_norm": 1e-5, "weights": 1e-5, "way": 1e-3},
    "bf16": {"loss": 2**-9, "grad_norm": 10 * 2**-9, "weights": 1e-2, "way": 0.1},
}


def test_every_strategy_is_enrolled() -> None:
    """All but DiLoCo, whose ranks step alone: it does not promise the numbers of one process."""
    enrolled = {name for name, _ in LAYOUTS}
    assert enrolled == set(STRATEGIES) - {"diloco"} == {"single", "ddp", "fsdp", "zero1", "zero2", "zero3"}
    assert {(name, layout.ranks) for name, layout in LAYOUTS} >= {("ddp", 3), ("fsdp", 4)}


@functools.cache
def reference(precision: str, samples: int = SAMPLES) -> Outcome:
    return on_ranks(train, 1, Job(precision=precision, samples=samples))[0]


def difference(outcome: Outcome, expected: Outcome, network: str = "bert") -> dict[str, float]:
    model, _, _ = make(Job(network=network))
    start = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    moved = sum(float(((expected.weights[n] - start[n]) ** 2).sum()) for n in start)
    apart = sum(float(((expected.weights[n] - outcome.weights[n]) ** 2).sum()) for n in start)
    size = sum(float((expected.weights[n] ** 2).sum()) for n in start)
    return {
        "loss": max(abs(a - b) / b for a, b in zip(outcome.losses, expected.losses, strict=True)),
        "grad_norm": max(abs(a - b) / b for a, b in zip(outcome.grad_norms, expected.grad_norms, strict=True)),
        "weights": (apart / size) ** 0.5,
        "way": (apart / moved) ** 0.5,
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=[f"{name}x{layout.ranks}" for name, layout in LAYOUTS])
def test_parity(
    name: str, layout: Layout, accumulate: int, precision: str, record_property: pytest.RecordProperty
) -> None:
    job = Job(name, dict(layout.options), accumulate, precision)
    outcomes = on_ranks(train, layout.ranks, job)
    expected = reference(precision)

    found = difference(outcomes[0], expected)
    for figure, value in found.items():
        record_property(figure, value)
    assert {figure: value for figure, value in found.items() if value > BOUNDS[precision][figure]} == {}
    assert set(outcomes[0].weights) == set(expected.weights)
    assert outcomes[0].evaluation["units"] == SAMPLES
    assert outcomes[0].evaluation["loss"] == pytest.approx(expected.evaluation["loss"], rel=BOUNDS[precision]["loss"])
    check_engine(name, layout, outcomes, accumulate)
    check_samples(outcomes)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=[f"{name}x{layout.ranks}" for name, layout in LAYOUTS])
def test_parity_where_ranks_have_nothing_to_do(name: str, layout: Layout) -> None:
    """The last step of the epoch has one sample: all other ranks compute a filler that must not count."""
    outcomes = on_ranks(train, layout.ranks, Job(name, dict(layout.options), samples=RAGGED))
    found = difference(outcomes[0], reference("fp32", RAGGED))
    assert {figure: value for figure, value in found.items() if value > BOUNDS["fp32"][figure]} == {}
    assert outcomes[0].units[2] == 1
    assert [len(outcome.seen[2]) for outcome in outcomes] == [1] + [0] * (layout.ranks - 1)
    assert outcomes[0].evaluation["units"] == RAGGED


def check_engine(name: str, layout: Layout, outcomes: list[Outcome], accumulate: int) -> None:
    """The strategy that was asked for was at work: read from its own objects on every rank."""
    for outcome in outcomes:
        effective = outcome.effective
        assert effective["strategy"] == name
        assert effective["ranks"] == layout.ranks
        assert effective["accumulation"] == accumulate
        assert effective["parameter_dtype"] == "float32"
        if name == "ddp":
            assert effective["engine"] == "DistributedDataParallel"
            assert effective["reduced_over_ranks"] == layout.ranks
        if name == "fsdp":
            size = layout.options.get("shard_size", layout.ranks)
            assert outcome.parameter_types == {"DTensor"}
            assert effective["mesh"] == ([layout.ranks // size, size] if "shard_size" in layout.options else [size])
            assert effective["units"] == 3, "two blocks and the root"
        if name.startswith("zero"):
            assert effective["engine"] == "DeepSpeedEngine"
            assert effective["stage"] == int(name[-1])
            assert (effective["partitioned_parameters"] > 0) == (name == "zero3")
        if name in SHARDED:
            share = 1 / layout.options.get("shard_size", layout.ranks)
            assert effective["share_of_this_rank"] == pytest.approx(share, rel=0.05)
    if name in SHARDED:
        assert sum(outcome.effective["share_of_this_rank"] for outcome in outcomes) >= 1


def check_samples(outcomes: list[Outcome]) -> None:
    """Ranks saw disjoint samples, together the whole step, and each sample once an epoch."""
    seen: Counter[int] = Counter()
    for step in range(STEPS):
        of_ranks = [set(outcome.seen[step]) for outcome in outcomes]
        together = set().union(*of_ranks)
        assert sum(map(len, of_ranks)) == len(together) == outcomes[0].units[step]
        seen.update(together)
        if step == 2:
            assert set(seen.values()) == {1}
            assert len(seen) == SAMPLES
    assert outcomes[0].units[:4] == [GLOBAL_BATCH, GLOBAL_BATCH, 5, GLOBAL_BATCH]


def test_the_seed_orders_the_samples_alike_everywhere() -> None:
    alone = reference("fp32").seen
    for outcome in on_ranks(train, 3, Job("ddp")):
        assert all(set(mine) <= set(all_) for mine, all_ in zip(outcome.seen, alone, strict=True))


def test_the_same_topology_gives_the_same_bits() -> None:
    job = Job("ddp", dropout=0.2)
    first, second = (on_ranks(train, 2, job)[0] for _ in range(2))
    assert first.losses == second.losses
    assert first.grad_norms == second.grad_norms
    assert all(np.array_equal(first.weights[n], second.weights[n]) for n in first.weights)


def test_dropout_differs_between_ranks_and_steps() -> None:
    streams = set()
    for step in range(1, 50):
        for rank in range(8):
            seed_all(3, step, rank)
            streams.add(tuple(torch.rand(4).tolist()))
    assert len(streams) == 49 * 8


@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=[f"{name}x{layout.ranks}" for name, layout in LAYOUTS])
def test_trainable_parameters_are_fp32_from_the_start(name: str, layout: Layout) -> None:
    """At a vanishing learning rate a bf16 run keeps every bit of the weights that it was given."""
    job = Job(name, dict(layout.options), precision="bf16", lr=1e-30, steps=3)
    outcome = on_ranks(train, layout.ranks, job)[0]
    start = tiny_bert().state_dict()
    # Zeros have taken the vanishing steps; all else is the same to the bit.
    assert all(np.allclose(start[n].numpy(), outcome.weights[n], rtol=0, atol=1e-25) for n in start)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("name", ["fsdp", "zero1", "zero3"])
def test_clipping_is_by_the_global_norm(name: str, max_grad_norm: float | None) -> None:
    job = Job(max_grad_norm=max_grad_norm, lr=1e-2)
    alone = on_ranks(train, 1, job)[0]
    shared = on_ranks(train, 2, Job(name, max_grad_norm=max_grad_norm, lr=1e-2))[0]
    assert shared.grad_norms == pytest.approx(alone.grad_norms, rel=1e-4)
    assert shared.losses == pytest.approx(alone.losses, rel=1e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_frozen_parameters_stay(name: str) -> None:
    outcome = on_ranks(train, 2, Job(name, frozen="bert.embeddings"))[0]
    start = tiny_bert().state_dict()
    same = {n for n in start if np.array_equal(start[n].numpy(), outcome.weights[n])}
    assert same == {n for n in start if n.startswith("bert.embeddings")}
    assert outcome.losses == pytest.approx(on_ranks(train, 1, Job(frozen="bert.embeddings"))[0].losses, rel=1e-5)


@pytest.mark.parametrize(("name", "ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_fp16_equals_fp32_within_its_rounding(name: str, ranks: int) -> None:
    outcome = on_ranks(train, ranks, Job(name, precision="fp16"))[0]
    assert outcome.applied == [True] * STEPS
    assert outcome.scales == [2.0**16] * STEPS
    assert outcome.losses == pytest.approx(reference("fp32").losses, rel=2**-11)


@pytest.mark.parametrize(("name", "ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_fp16_skips_steps_until_the_scale_fits(name: str, ranks: int) -> None:
    """Every rank skips alike, nothing is applied at a skipped step, and the scale halves with each."""
    outcomes = on_ranks(train, ranks, Job(name, precision="fp16", loss_scale=2.0**24))
    outcome = outcomes[0]
    assert not outcome.applied[0]
    assert any(outcome.applied)
    skipped = np.cumsum([0] + [not applied for applied in outcome.applied])
    assert outcome.scales == [2.0 ** (24 - n) for n in skipped[:-1]]
    finite = [bool(np.isfinite(norm)) for norm in outcome.grad_norms]
    assert finite == outcome.applied
    assert all(other.applied == outcome.applied for other in outcomes)
    assert all(np.isfinite(tensor).all() for tensor in outcome.weights.values())
