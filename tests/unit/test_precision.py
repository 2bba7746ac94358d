"""Number formats: which one is taken, and the loss scale of fp16."""

from __future__ import annotations

import copy
import math
import platform
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from toolkit.errors import ConfigError
from toolkit.precision import (
    INITIAL_LOSS_SCALE,
    MINIMUM_LOSS_SCALE,
    LossScaler,
    Precision,
    Reduced,
    choose_precision,
    has_bf16,
)
from toolkit.world import World, world

CPU = torch.device("cpu")


def launched_with(mixed_precision: str) -> World:
    return world({"ACCELERATE_MIXED_PRECISION": mixed_precision, "ACCELERATE_USE_CPU": "true"})


# Which one.


@pytest.mark.parametrize(
    ("requested", "launcher", "name", "reason"),
    [
        ("fp32", "no", "fp32", "as asked"),
        ("bf16", "no", "bf16", "as asked"),
        ("fp16", "no", "fp16", "as asked"),
        ("fp8", "no", "fp8", "as asked"),
        ("auto", "bf16", "bf16", "the launcher's --mixed_precision"),
        ("auto", "fp8", "fp8", "the launcher's --mixed_precision"),
        ("auto", "fp16", "fp16", "the launcher's --mixed_precision"),
        ("bf16", "bf16", "bf16", "the launcher's --mixed_precision"),
    ],
)
def test_command_line_and_launcher(requested: str, launcher: str, name: str, reason: str) -> None:
    assert choose_precision(requested, launched_with(launcher)) == Precision(name, reason)


@pytest.mark.parametrize(("requested", "launcher"), [("fp32", "bf16"), ("bf16", "fp16"), ("fp16", "bf16")])
def test_contradiction_names_both(requested: str, launcher: str) -> None:
    message = f"--precision {requested} contradicts the launcher's --mixed_precision {launcher}"
    with pytest.raises(ConfigError, match=message) as caught:
        choose_precision(requested, launched_with(launcher))
    assert caught.value.remedy == "Drop one of the two."


def test_auto_goes_by_the_hardware() -> None:
    taken = choose_precision("auto", launched_with("no"))
    assert taken.name == ("bf16" if has_bf16(CPU) else "fp32")
    assert taken.reason.startswith("auto: the hardware")


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="reads /proc/cpuinfo")
def test_bf16_of_this_cpu() -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    assert has_bf16(CPU) is bool({"avx512_bf16", "amx_bf16"} & set(flags))


# What it does.


class Net(nn.Module):
    """A table, one layer, and a head that shares the table's weights where it is tied."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.seen: list[torch.dtype] = []
        if tied:
            self.head.weight = self.table.weight

    def block(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen += [hidden.dtype, self.layer.weight.dtype]
        return self.layer(hidden).relu()

    def forward(self, ids: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        hidden = self.table(ids) + shift
        return self.head(checkpoint(self.block, hidden, use_reentrant=False))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_computes_with_copies_and_its_weights_get_gradients_in_fp32(dtype: torch.dtype, tied: bool) -> None:
    torch.manual_seed(0)
    net = Net(tied)
    plain = copy.deepcopy(net)
    inputs = {"ids": torch.arange(9), "shift": torch.ones(4)}
    reduced = Reduced(net, dtype)
    outputs = reduced.forward(inputs)
    reduced.backward(outputs.float().square().sum())
    assert outputs.dtype == dtype
    assert len(net.seen) == 4, "the block is computed again in the backward pass"
    assert set(net.seen) == {dtype}
    plain(**inputs).square().sum().backward()
    for (name, mine), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert mine.grad is not None
        assert mine.grad.dtype == torch.float32
        assert theirs.grad is not None
        assert float((mine.grad - theirs.grad).norm() / theirs.grad.norm()) < 0.02, name


def test_copies_are_made_once_until_the_weights_change() -> None:
    net = Net()
    reduced, inputs = Reduced(net, torch.bfloat16), {"ids": torch.arange(9), "shift": torch.ones(4)}
    with torch.no_grad():
        first = reduced.forward(inputs)
        net.layer.weight.mul_(2)
        assert torch.equal(reduced.forward(inputs), first)
        reduced.forget()
        assert not torch.equal(reduced.forward(inputs), first)
    outputs = [reduced.forward(inputs) for _ in range(2)]  # two micro-batches, one set of copies
    for output in outputs:
        reduced.backward(output.float().sum())
    assert net.layer.weight.grad is not None


def test_a_parameter_in_two_places_is_cast_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.first.weight is self.second.weight
            assert self.first.weight.dtype == torch.bfloat16
            result: torch.Tensor = self.second(self.first(x))
            return result

    net = Tied()
    parameter = net.first.weight
    reduced = Reduced(net, torch.bfloat16)
    reduced.backward(reduced.forward({"x": torch.ones(2, 4)}).float().sum())
    assert net.first.weight is net.second.weight is parameter
    assert parameter.grad is not None
    with pytest.raises(RuntimeError):
        reduced.forward({"x": torch.ones(2, 5)})
    assert net.first.weight is parameter, "an error leaves the model as it was"


# The loss scale.


def test_scale_halves_when_the_norm_is_not_finite_and_the_step_is_skipped() -> None:
    scaler = LossScaler(enabled=True)
    assert scaler.scale == INITIAL_LOSS_SCALE == 65536
    for norm, scale in ((math.inf, 32768), (math.nan, 16384), (-math.inf, 8192)):
        assert scaler.update(norm) is False
        assert scaler.scale == scale
    assert scaler.update(1.0) is True
    assert scaler.scale == 8192


def test_scale_doubles_after_so_many_good_steps_in_a_row() -> None:
    scaler = LossScaler(enabled=True, scale=8.0, growth_interval=3)
    scales = []
    for norm in (1.0, 1.0, math.inf, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        scaler.update(norm)
        scales.append(scaler.scale)
    #               the interval begins anew ↓                 ↓ and again
    assert scales == [8.0, 8.0, 4.0, 4.0, 4.0, 8.0, 8.0, 8.0, 16.0, 16.0]


def test_scale_never_falls_below_the_minimum() -> None:
    scaler = LossScaler(enabled=True, scale=4.0)
    scales = []
    for _ in range(5):
        assert scaler.update(math.nan) is False
        scales.append(scaler.scale)
    assert scales == [2.0, MINIMUM_LOSS_SCALE, MINIMUM_LOSS_SCALE, MINIMUM_LOSS_SCALE, MINIMUM_LOSS_SCALE]


def test_disabled_scaler_scales_nothing_and_never_skips() -> None:
    scaler = LossScaler(enabled=False)
    assert [scaler.update(norm) for norm in (1.0, math.inf, math.nan)] == [True, True, True]
    assert scaler.scale == 1.0
