"""What is recorded as a CUDA graph, and where that is refused; what is recorded is tested in tests/gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity.job import tiny_bert, tiny_data, tiny_tokenizer
from tests.unit.test_strategy_choice import choose
from toolkit.compute import remove_padding
from toolkit.compute.texts import ROW, Texts, few_sizes
from toolkit.errors import ConfigError
from toolkit.graphs import check_graphs, check_recordable
from toolkit.tasks import Classification, LanguageModeling

CPU = torch.device("cpu")
REFUSED: list[tuple[str, dict[str, Any], str, bool]] = [
    ("a CPU", {"device": "cpu"}, "none", False),
    ("strategy ddp", {"size": 2, "name": "ddp"}, "none", False),
    ("--precision fp32", {"precision": "fp32"}, "none", False),
    ("--precision fp16", {"precision": "fp16"}, "none", False),
    ("activation checkpointing", {}, "full", False),
    ("a quantized base", {}, "none", True),
]


def chosen(size: int = 1, name: str = "single", device: str = "cuda", precision: str = "bf16") -> Any:
    return choose(size, name=name, device=device, precision=precision)


@pytest.mark.parametrize(("what", "options", "checkpointing", "low_bit"), REFUSED, ids=[row[0] for row in REFUSED])
def test_where_nothing_is_recorded(what: str, options: dict[str, Any], checkpointing: str, low_bit: bool) -> None:
    check_graphs(chosen(), "none", low_bit=False)
    with pytest.raises(ConfigError, match=f"--train.cuda_graphs does not work with {what}") as caught:
        check_graphs(chosen(**options), checkpointing, low_bit)
    assert caught.value.remedy


def test_shapes_must_be_few() -> None:
    task = classification()
    check_recordable(task, "none")
    with pytest.raises(ConfigError, match="a model without padding; it is padded to the longest of a micro-batch"):
        check_recordable(task, "to the longest of a micro-batch (as asked)")
    with pytest.raises(ConfigError, match="the task LanguageModeling, whose shapes are too many"):
        check_recordable(LanguageModeling(tiny_tokenizer(), vocabulary=100), "none")


def classification() -> Classification:
    return Classification(["a", "b", "c"], tiny_tokenizer(), positions=32)


@pytest.mark.parametrize(
    ("size", "length", "found"), [(8, 32, (8, 32)), (11, 24, (11, 24)), (8, 64, (8, 32))], ids=["even", "odd", "limit"]
)
def test_what_fills_a_batch_up_changes_nothing(size: int, length: int, found: tuple[int, int]) -> None:
    model, task = tiny_bert(), classification()
    assert remove_padding(model) == ""
    batch = task.collate(tiny_data()[:8], empty=False)
    filled = task.filled(batch, size, length)
    assert filled.inputs["attention_mask"].shape == found
    assert task.units(filled) == task.units(batch) == 8
    losses = [task.loss(model(**part.inputs), part) for part in (batch, filled)]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_sizes_are_few_and_little_larger() -> None:
    sizes = {few_sizes(count) for count in range(1025, 2049)}
    assert len(sizes) == 17
    assert all(size % multiple == 0 for size, multiple in sizes)
    assert all(0 <= few_sizes(count)[0] - count <= count / 16 for count in range(1, 5000))


def test_other_texts_in_the_same_places() -> None:
    """What a recording reads from is filled anew, and is then what it would have been if it had been made anew."""
    lengths = torch.tensor([[5, 9, 1, 7], [3, 3, 8, 9]])
    first, second = (torch.arange(9) < part[:, None] for part in lengths)
    texts, expected = Texts(first, CPU), Texts(second, CPU)
    places = {name: value for name, value in vars(texts).items() if isinstance(value, torch.Tensor)}
    padded, row = torch.randn(4, 9, 2), torch.randn(1, ROW, 2)
    assert not torch.equal(texts.unpack(row), expected.unpack(row))
    texts.refill(second)
    assert torch.equal(texts.pack(padded), expected.pack(padded))
    assert torch.equal(texts.unpack(row), expected.unpack(row))
    assert torch.equal(texts.bounds, expected.bounds)
    assert texts.bounds.tolist() == [0, 3, 6, 14, 23, ROW]
    assert all(places[name] is getattr(texts, name) for name in ("_places", "_inverse", "_padding", "bounds"))
    with pytest.raises(AssertionError, match="more tokens than there is room for"):
        texts.refill(torch.ones(4, 9, dtype=torch.bool))


def test_a_row_and_its_batch_hold_the_same_tokens_and_gradients() -> None:
    mask = torch.arange(9) < torch.tensor([5, 9, 1, 7])[:, None]
    texts = Texts(mask, CPU)
    padded = torch.randn(4, 9, 3, requires_grad=True)
    row = texts.pack(padded)
    assert row.shape == (1, ROW, 3)
    back = texts.unpack(row)
    assert torch.equal(back, padded.detach() * mask[:, :, None])
    weights = torch.randn(4, 9, 3)
    (back * weights).sum().backward()
    assert padded.grad is not None
    assert torch.equal(padded.grad, weights * mask[:, :, None])
