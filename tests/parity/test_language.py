"""A language model under every strategy, its texts packed: the numbers of one process with whole logits and padding."""

from __future__ import annotations

import pytest

from tests.parity.job import SAMPLES, STEPS, Job, Outcome, tiny_texts, train
from tests.parity.test_parity import BOUNDS, LAYOUTS, check_engine, difference
from tests.ranks import on_ranks
from toolkit.strategies import Layout

PLAIN, LEAN = "llama", "llama without logits or padding"
SMALLEST = dict(reversed(LAYOUTS))
"""The first layout of each strategy."""


@pytest.fixture(scope="module")
def reference() -> Outcome:
    return on_ranks(train, 1, Job(network=PLAIN))[0]


@pytest.mark.parametrize(("name", "layout"), SMALLEST.items(), ids=SMALLEST)
def test_parity(name: str, layout: Layout, reference: Outcome) -> None:
    outcomes = on_ranks(train, layout.ranks, Job(name, dict(layout.options), 2, network=LEAN))
    found = difference(outcomes[0], reference, PLAIN)
    assert {figure: value for figure, value in found.items() if value > BOUNDS["fp32"][figure]} == {}
    for figure in ("loss", "perplexity", "bits_per_byte", "units"):
        assert outcomes[0].evaluation[figure] == pytest.approx(reference.evaluation[figure], rel=1e-5)
    check_engine(name, layout, outcomes, 2)
    for step, whole in enumerate(reference.seen):  # dealt to the ranks, each sample to one
        assert sorted(id_ for outcome in outcomes for id_ in outcome.seen[step]) == sorted(whole)
    assert layout.ranks == 1 or all(outcome.seen[0] for outcome in outcomes)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero3"])
def test_parity_in_bf16(name: str, reference: Outcome) -> None:
    outcome = on_ranks(train, 2, Job(name, precision="bf16", network=LEAN))[0]
    assert outcome.losses == pytest.approx(reference.losses, rel=2**-7)


def test_units_are_the_tokens_that_are_predicted(reference: Outcome) -> None:
    rows = tiny_texts()
    predicted = {id_: length - 2 for id_, length in zip(rows["id"], rows["length"], strict=True)}
    for step in range(STEPS):
        assert reference.units[step] == sum(predicted[id_] for id_ in reference.seen[step])
    assert reference.evaluation["units"] == sum(predicted.values())
    assert len(predicted) == SAMPLES


@pytest.fixture(scope="module")
def in_fp8() -> Outcome:
    pytest.importorskip("torchao", reason="needs torchao, with which every start takes longer")
    return on_ranks(train, 1, Job(network=LEAN, precision="fp8"))[0]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero1", "zero2"])
def test_parity_in_fp8(name: str, in_fp8: Outcome, reference: Outcome) -> None:
    """Nearer to one process in fp8 than that is to fp32: all round alike."""
    outcomes = on_ranks(train, 2, Job(name, precision="fp8", network=LEAN))
    found = difference(outcomes[0], in_fp8, PLAIN)
    assert {figure: value for figure, value in found.items() if value > BOUNDS["bf16"][figure]} == {}
    assert found["way"] < difference(in_fp8, reference, PLAIN)["way"]
    assert outcomes[0].losses == pytest.approx(reference.losses, rel=2**-5)
    assert outcomes[0].effective["precision"] == "fp8"
    assert outcomes[0].effective["parameter_dtype"] == "float32"
