"""Every cell that the support matrix calls tested: losses, gradient norms and weights equal those of one process.

In fp32 the bounds are those of unquantized runs, a relative 1e-5: a weight is brought to fp32 from the same bits in the
same way, wherever it lies, so nothing but the order of sums differs.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from tests.parity.job import STEPS, Job, Outcome, make, train
from tests.parity.test_parity import BOUNDS, LAYOUTS, check_engine
from tests.ranks import on_ranks
from toolkit.adapters import add_adapter
from toolkit.config import AdapterConfig
from toolkit.models import parameter_counts
from toolkit.quantization import LowBit
from toolkit.strategies import MATRIX, Layout
from toolkit.strategies.support import Cell

NETWORK = "llama without logits or padding"
SMALLEST = dict(reversed(LAYOUTS))
"""The smallest world of each strategy."""
CELLS = [cell for cell in MATRIX if cell.tested and cell.adapter != "none" and cell.strategy != "diloco"]
"""What trains all weights is in `test_parity`, DiLoCo below."""
UNDER_DILOCO = ("lora", "rslora", "dora", "pissa", "ia3", "prompt", "prefix")
QUICK = {
    *(("nf4", "lora", strategy) for strategy in ("single", "ddp", "fsdp", "zero2", "zero3")),
    *(("int8", "dora", "ddp"), ("nf4-double", "dora", "fsdp"), ("fp4", "ia3", "zero2")),
    *(("nf4", "loftq", "fsdp"), ("none", "prompt", "zero3"), ("none", "prefix", "fsdp")),
}


def name_of(cell: Cell) -> str:
    return f"{cell.quantization}-{cell.adapter}-{cell.strategy}"


def marked(cell: Cell) -> Any:
    slow = () if (cell.quantization, cell.adapter, cell.strategy) in QUICK else pytest.mark.slow
    return pytest.param(cell, id=name_of(cell), marks=slow)


def adapter(name: str) -> AdapterConfig:
    settings = {"ia3": {}, "prompt": {"virtual_tokens": 5}, "prefix": {"virtual_tokens": 5}}
    return AdapterConfig(name=name, **settings.get(name, {"rank": 4}))  # type: ignore[arg-type]


def job(cell: Cell, **more: Any) -> Job:
    options = dict(SMALLEST[cell.strategy].options) if cell.strategy in SMALLEST else {}
    return Job(
        cell.strategy,
        options,
        adapter=adapter(cell.adapter),
        quantization=cell.quantization,  # type: ignore[arg-type]
        network=NETWORK,
        **more,
    )


@functools.cache
def reference(quantization: str, adapter: str, precision: str = "fp32") -> Outcome:
    return on_ranks(train, 1, job(Cell("single", quantization, adapter, None), precision=precision))[0]


@functools.cache
def start(cell: Cell) -> tuple[dict[str, np.ndarray[Any, Any]], set[str]]:
    """The weights that are not quantized, and the names of those that are trained."""
    return on_ranks(made, 1, job(cell), cell.quantization)[0]  # type: ignore[no-any-return]


def made(job: Job, quantization: str) -> tuple[dict[str, np.ndarray[Any, Any]], set[str]]:
    """On a rank, whose threads add up PiSSA's products in the same order."""
    model = add_adapter(make(job)[0], job.adapter, seed=5, low_bit=LowBit(quantization))
    weights = {name: p for name, p in model.named_parameters() if p.dtype.is_floating_point}
    return (
        {name: weight.detach().numpy().copy() for name, weight in weights.items()},
        {name for name, weight in weights.items() if weight.requires_grad},
    )


def far(outcome: Outcome, expected: Outcome, cell: Cell) -> dict[str, float]:
    """Of what is trained alone, or the frozen weights would hide it."""
    before, trained = start(cell)
    apart = sum(float(((expected.weights[n] - outcome.weights[n]) ** 2).sum()) for n in trained)
    way = sum(float(((expected.weights[n] - before[n]) ** 2).sum()) for n in trained)
    return {
        "loss": max(abs(a - b) / b for a, b in zip(outcome.losses, expected.losses, strict=True)),
        "grad_norm": max(abs(a - b) / b for a, b in zip(outcome.grad_norms, expected.grad_norms, strict=True)),
        "way": (apart / way) ** 0.5,
    }


def moved(outcome: Outcome, cell: Cell) -> set[str]:
    before, _ = start(cell)
    return {name for name, weight in before.items() if not np.array_equal(outcome.weights[name], weight)}


def test_the_cells_are_there() -> None:
    low = [cell for cell in CELLS if cell.quantization != "none"]
    assert len(low) == 120
    assert {cell.strategy for cell in low} == {"single", "ddp", "fsdp", "zero1", "zero2", "zero3"}
    assert len(CELLS) - len(low) == 42
    assert {(cell.quantization, cell.adapter, cell.strategy) for cell in CELLS} >= QUICK


@pytest.mark.parametrize("cell", [marked(cell) for cell in CELLS])
def test_parity(cell: Cell) -> None:
    layout: Layout = SMALLEST[cell.strategy]
    outcomes = on_ranks(train, layout.ranks, job(cell))
    expected = reference(cell.quantization, cell.adapter)
    found, bounds = far(outcomes[0], expected, cell), BOUNDS["fp32"]
    assert {figure: value for figure, value in found.items() if value > bounds[figure]} == {}
    assert outcomes[0].evaluation["loss"] == pytest.approx(expected.evaluation["loss"], rel=1e-5)
    assert moved(outcomes[0], cell) == start(cell)[1]
    check_engine(cell.strategy, layout, outcomes, 1)
    for step in range(STEPS):  # disjoint samples, together the whole step
        dealt = sorted(sample for outcome in outcomes for sample in outcome.seen[step])
        assert dealt == sorted(expected.seen[step])
    check_packed(cell, outcomes)


def check_packed(cell: Cell, outcomes: list[Outcome]) -> None:
    """What is quantized is held in shares where parameters are, and has the bits that it was loaded with."""
    low = cell.quantization != "none"
    assert len(outcomes[0].packed) == (14 if low else 0)
    assert outcomes[0].packed == reference(cell.quantization, cell.adapter).packed
    shares = 2 if low and cell.strategy in ("fsdp", "zero3") else 1
    assert [outcome.share_of_packed for outcome in outcomes] == [pytest.approx(1 / shares)] * len(outcomes)


def in_bf16() -> list[Any]:
    cells = [cell for cell in CELLS if cell.adapter == "lora" and cell.quantization in ("nf4", "int8")]
    quick = {("nf4", "single"), ("nf4", "fsdp")}
    return [
        pytest.param(c, id=name_of(c), marks=() if (c.quantization, c.strategy) in quick else pytest.mark.slow)
        for c in cells
    ]


@pytest.mark.parametrize("cell", in_bf16())
def test_bf16(cell: Cell) -> None:
    """Products are narrower; what is trained is not, and the packed bits stay."""
    outcome = on_ranks(train, SMALLEST[cell.strategy].ranks, job(cell, precision="bf16"))[0]
    assert outcome.effective["parameter_dtype"] == "float32"
    assert outcome.losses == pytest.approx(reference(cell.quantization, "lora").losses, rel=2**-8)
    assert outcome.grad_norms == pytest.approx(reference(cell.quantization, "lora", "bf16").grad_norms, rel=10 * 2**-9)
    assert moved(outcome, cell) == start(cell)[1]
    assert outcome.packed == reference(cell.quantization, "lora").packed


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "lora" else pytest.mark.slow) for name in UNDER_DILOCO]
)
def test_diloco_trains_the_adapter_alone(name: str) -> None:
    """It does not promise the numbers of one process."""
    cell = Cell("diloco", "none", name, None)
    assert cell in MATRIX
    outcome = on_ranks(train, 2, Job("diloco", {"local_steps": 4}, adapter=adapter(name), network=NETWORK))[0]
    assert moved(outcome, cell) == start(cell)[1]
    assert np.isfinite(outcome.losses).all()


def test_the_counts_are_true() -> None:
    """A byte holds two weights, and a number of four bytes eight."""
    import torch

    plain = sum(p.numel() for p in make(Job(network=NETWORK))[0].parameters())
    for quantization in ("int8", "nf4", "fp4-double"):
        for storage in (torch.uint8, torch.bfloat16, torch.float32):
            low_bit = LowBit(quantization, storage=storage)
            model = add_adapter(make(Job(network=NETWORK))[0], adapter("lora"), seed=5, low_bit=low_bit)
            total, trainable = parameter_counts(model)
            assert total == plain + trainable
