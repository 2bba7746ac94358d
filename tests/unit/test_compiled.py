"""Blocks that torch compiles: the same numbers, and nothing compiled anew for rows of another length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.parity.job import Recording, tiny_bert, tiny_data
from toolkit.compute import compile_blocks, compile_seconds, remove_padding, replace_dropout
from toolkit.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    """As if nothing had been compiled before."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def losses_and_gradient(model: Any, batches: int) -> tuple[list[float], torch.Tensor]:
    task, rows = Recording(), tiny_data()
    task.seen.append([])
    losses = []
    for number in range(batches):
        batch = task.collate(rows[5 * number : 5 * number + 5], empty=False)
        loss = task.loss(model(**batch.inputs), batch)
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("free", [True, False], ids=["no padding", "padded"])
def test_the_numbers_stay_and_lengths_compile_nothing_anew(free: bool) -> None:
    plain = tiny_bert().train()
    if free:
        assert remove_padding(plain) == ""
    compiled = tiny_bert().train()
    if free:
        assert remove_padding(compiled) == ""
    assert compile_blocks(compiled, CPU) == 2
    losses_and_gradient(compiled, 2)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0, "something is compiled"
    assert compile_seconds() > 0
    compiled.zero_grad()
    (expected, gradient), (losses, found) = losses_and_gradient(plain, 6), losses_and_gradient(compiled, 6)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert float((found - gradient).norm() / gradient.norm()) < 1e-5
    assert counters["stats"]["unique_graphs"] == graphs


def test_quick_dropout_draws_as_it_does_without() -> None:
    models = [tiny_bert(dropout=0.3).train() for _ in range(2)]
    for model in models:
        assert remove_padding(model) == ""
        replace_dropout(model)
    compile_blocks(models[1], CPU)
    found = []
    for model in models:
        torch.manual_seed(0)
        found.append(losses_and_gradient(model, 2)[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_names_of_weights_stay() -> None:
    model = tiny_bert()
    names = list(model.state_dict())
    compile_blocks(model, CPU)
    assert list(model.state_dict()) == names


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no repeated blocks"):
        compile_blocks(nn.Linear(2, 2), CPU)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        compile_blocks(tiny_bert(), CPU)
