"""Adapters train alike under every strategy: losses, gradient norms and weights equal those of one process."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from tests.parity.job import SAMPLES, Job, Outcome, tiny_bert, train
from tests.parity.test_parity import BOUNDS, LAYOUTS, check_engine, check_samples
from tests.ranks import on_ranks
from toolkit.adapters import add_adapter
from toolkit.config import AdapterConfig
from toolkit.models import parameter_counts
from toolkit.strategies import Layout

TARGETS = ("query", "value", "intermediate.dense")
ADAPTERS = {
    "lora": AdapterConfig(name="lora", rank=4, targets=TARGETS, lr_ratio=4),
    "dora": AdapterConfig(name="dora", rank=4, targets=TARGETS),
    "pissa": AdapterConfig(name="pissa", rank=4),
    "ia3": AdapterConfig(name="ia3"),
    "prompt": AdapterConfig(name="prompt", virtual_tokens=5),
}
QUICK = {("lora", "ddp"), ("lora", "fsdp"), ("dora", "zero2"), ("dora", "zero3"), ("prompt", "ddp")}
PLACES = [(name, layout) for name, layout in LAYOUTS if layout.ranks == 2]


def marked(adapter: str, name: str, layout: Layout) -> object:
    slow = () if (adapter, name) in QUICK else pytest.mark.slow
    return pytest.param(adapter, name, layout, id=f"{adapter}-{name}x{layout.ranks}", marks=slow)


CASES = [
    marked(adapter, name, layout)
    for adapter in ADAPTERS
    for name, layout in PLACES
    if adapter != "prompt" or name in ("ddp", "zero3")  # the others are in test_support
]


@functools.cache
def reference(adapter: str, precision: str = "fp32") -> Outcome:
    return on_ranks(train, 1, Job(adapter=ADAPTERS[adapter], precision=precision))[0]


def start(adapter: str) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    model = add_adapter(tiny_bert(), ADAPTERS[adapter], seed=5)
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def trained(adapter: str) -> set[str]:
    model = add_adapter(tiny_bert(), ADAPTERS[adapter], seed=5)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def moved(outcome: Outcome, adapter: str) -> set[str]:
    before = start(adapter)
    assert set(outcome.weights) == set(before)
    return {name for name, weights in outcome.weights.items() if not np.array_equal(weights, before[name])}


def far(outcome: Outcome, expected: Outcome, adapter: str) -> dict[str, float]:
    """Of what is trained alone, or the frozen weights would hide it."""
    names, before = trained(adapter), start(adapter)
    apart = sum(float(((expected.weights[n] - outcome.weights[n]) ** 2).sum()) for n in names)
    way = sum(float(((expected.weights[n] - before[n]) ** 2).sum()) for n in names)
    return {
        "loss": max(abs(a - b) / b for a, b in zip(outcome.losses, expected.losses, strict=True)),
        "grad_norm": max(abs(a - b) / b for a, b in zip(outcome.grad_norms, expected.grad_norms, strict=True)),
        "way": (apart / way) ** 0.5,
    }


def test_the_cases_are_there() -> None:
    assert {name for name, _ in PLACES} == {"ddp", "fsdp", "zero1", "zero2", "zero3"}
    assert len(CASES) == 22


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_one_process_trains_the_adapter_alone(adapter: str) -> None:
    outcome = reference(adapter)
    assert moved(outcome, adapter) == trained(adapter)
    assert outcome.losses[-1] < outcome.losses[0]
    assert outcome.evaluation["units"] == SAMPLES


@pytest.mark.parametrize(("adapter", "name", "layout"), CASES)
def test_parity(adapter: str, name: str, layout: Layout) -> None:
    outcomes = on_ranks(train, layout.ranks, Job(name, dict(layout.options), adapter=ADAPTERS[adapter]))
    expected, bounds = reference(adapter), BOUNDS["fp32"]
    found = far(outcomes[0], expected, adapter)
    assert {figure: value for figure, value in found.items() if value > bounds[figure]} == {}
    assert moved(outcomes[0], adapter) == trained(adapter)
    ratio = ADAPTERS[adapter].lr_ratio
    assert set(outcomes[0].effective["lr_multiples"]) == ({1.0, ratio} if ratio else {1.0})
    check_engine(name, layout, outcomes, 1)
    check_samples(outcomes)


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        ("lora", "single"),
        *(pytest.param(a, n, marks=pytest.mark.slow) for a in list(ADAPTERS)[:4] for n in ("fsdp", "zero2")),
    ],
)
def test_bf16(adapter: str, name: str) -> None:
    """The copies that a step computes with are narrower; what is trained is not, and what is frozen stays."""
    outcome = on_ranks(train, 1 if name == "single" else 2, Job(name, adapter=ADAPTERS[adapter], precision="bf16"))[0]
    assert outcome.effective["parameter_dtype"] == "float32"
    assert outcome.losses == pytest.approx(reference(adapter).losses, rel=2e-2)
    assert moved(outcome, adapter) == trained(adapter)


@pytest.mark.parametrize(("name", "ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2), ("zero2", 2), ("zero3", 2)])
def test_a_base_that_nobody_saves_is_held_in_bf16_alone(name: str, ranks: int) -> None:
    """And what is computed is the same to the bit."""
    job = Job(name, adapter=ADAPTERS["lora"], precision="bf16")
    (twice, *_), (once, *_) = (on_ranks(train, ranks, replace(job, leave_out=out)) for out in (False, True))
    if not name.startswith("zero"):  # whose engine holds it so, and kept another beside
        assert (twice.effective["frozen_dtypes"], once.effective["frozen_dtypes"]) == (["float32"], ["bfloat16"])
    assert once.effective["parameter_dtype"] == "float32"
    assert (once.losses, once.grad_norms, once.evaluation) == (twice.losses, twice.grad_norms, twice.evaluation)
    assert once.weights.keys() == trained("lora")
    assert all((once.weights[weight] == twice.weights[weight]).all() for weight in once.weights)


def test_the_counts_are_those_of_the_formula() -> None:
    """LoRA (Hu et al. 2021, section 4.1): rank × (inputs + outputs) for each layer; DoRA: its outputs more."""
    plain, classifier = sum(p.numel() for p in tiny_bert().parameters()), 32 * 3 + 3
    products = 2 * (2 * 4 * (32 + 32) + 4 * (32 + 64))
    for adapter, more in (("lora", 0), ("dora", 2 * (32 + 32 + 64))):
        total, trainable = parameter_counts(add_adapter(tiny_bert(), ADAPTERS[adapter], seed=5))
        assert trainable == products + more + classifier
        assert total == plain + trainable
