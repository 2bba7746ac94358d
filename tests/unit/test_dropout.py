"""Quick dropout: what torch's dropout does, from fewer draws."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit.compute import replace_dropout
from toolkit.compute.dropout import QuickDropout, keep_mask, kept_scale


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
def test_a_share_is_dropped_and_the_mean_stays(p: float) -> None:
    torch.manual_seed(0)
    kept = keep_mask(torch.Size([1000, 1003]), p, torch.float32)
    size = kept.numel()
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    deviation = (p * (1 - p) / size) ** 0.5
    assert float(1 - kept.mean()) == pytest.approx(p, abs=5 * deviation + 2**-17)
    assert float(kept.mean()) * kept_scale(p) == pytest.approx(1, abs=5 * deviation / (1 - p))


def test_neighbours_are_independent() -> None:
    """Elements, rows and draws, four of which come from one word."""
    torch.manual_seed(0)
    kept = keep_mask(torch.Size([1024, 1024]), 0.5, torch.float32) * 2 - 1
    flat = kept.flatten()
    for lag in (1, 2, 3, 4, 5, 8, 1024):
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 5 / len(flat) ** 0.5
    other = keep_mask(kept.shape, 0.5, torch.float32) * 2 - 1
    assert abs(float((kept * other).mean())) < 5 / len(flat) ** 0.5


def test_torchs_seed_decides() -> None:
    layer, values = QuickDropout(0.5), torch.ones(1000)
    torch.manual_seed(3)
    first, second = layer(values), layer(values)
    torch.manual_seed(3)
    assert torch.equal(layer(values), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_goes_where_the_values_went(dtype: torch.dtype) -> None:
    layer, values = QuickDropout(0.1), torch.randn(33, 7, dtype=dtype, requires_grad=True)
    dropped = layer(values)
    dropped.sum().backward()
    assert values.grad is not None
    assert dropped.dtype == dtype
    torch.testing.assert_close(values.grad * values, dropped, rtol=2e-2, atol=0)
    assert set((values.grad == 0).flatten().tolist()) == {True, False}


def test_layers_are_replaced_where_they_are() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Dropout(0.2), nn.AlphaDropout(0.1)))
    assert replace_dropout(model) == 2
    values = torch.ones(50)
    assert torch.equal(model.eval()(values), values)
    assert not torch.equal(model.train()(values), values)
    assert QuickDropout(1.0)(values).sum() == 0
    assert torch.equal(QuickDropout(0.0)(values), values)
