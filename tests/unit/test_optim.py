"""The learning rate at exact steps, worked out by hand, and which parameters decay."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from tests.parity.job import tiny_bert
from toolkit.config import OptimConfig
from toolkit.errors import ConfigError
from toolkit.optim import adamw, build_schedule, parameter_groups


def rates(total_steps: int, **options: object) -> list[float]:
    """Of all steps, as shares of a peak of 1."""
    schedule = build_schedule(OptimConfig(lr=2.0, **options), total_steps)  # type: ignore[arg-type]
    return [schedule(step) / 2.0 for step in range(1, total_steps + 1)]


# The learning rate.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Up to the peak in `warmup_steps`, then towards the final share, which the step after the last would have.
        ({"schedule": "linear", "warmup_steps": 2}, [1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"schedule": "linear", "warmup_steps": 0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"schedule": "linear", "warmup_steps": 8, "final_share": 0.5}, [*(i / 8 for i in range(1, 9)), 1, 0.75]),
        ({"schedule": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup_share": 0.0}, [1] * 10),
        # cos(π/4) = √½, cos(π/2) = 0
        (
            {"schedule": "cosine", "warmup_steps": 6},
            [*(i / 6 for i in range(1, 7)), 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2],
        ),
        (
            {"schedule": "cosine", "warmup_steps": 8, "final_share": 0.2},
            [*(i / 8 for i in range(1, 9)), 1, 0.2 + 0.8 * 0.5],
        ),
        # Warm-up, stable, decay: the last 40 % fall.
        (
            {"schedule": "wsd", "warmup_steps": 2, "decay_share": 0.4},
            [1 / 2, 1, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4],
        ),
        ({"schedule": "wsd", "warmup_steps": 0}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1 / 2]),
        (
            {"schedule": "wsd", "warmup_share": 0.5, "decay_share": 0.5, "final_share": 0.5},
            [0.2, 0.4, 0.6, 0.8, 1, 1, 0.9, 0.8, 0.7, 0.6],
        ),
        # Shares are rounded to steps.
        ({"schedule": "linear", "warmup_share": 0.26}, [1 / 3, 2 / 3, 1, *((7 - i) / 7 for i in range(7))]),
    ],
)
def test_rates(options: dict[str, object], expected: list[float]) -> None:
    assert rates(10, **options) == pytest.approx(expected, rel=1e-12)


def test_first_step_moves_and_the_peak_is_the_peak() -> None:
    for schedule in ("linear", "cosine", "constant", "wsd"):
        found = rates(100, schedule=schedule)
        assert len(found) == 100
        assert found[0] == pytest.approx(0.1)  # 10 steps of warm-up
        assert max(found) == 1.0
        assert all(rate > 0 for rate in found)


def test_one_step_runs_at_the_peak() -> None:
    for schedule in ("linear", "cosine", "constant", "wsd"):
        assert rates(1, schedule=schedule) == [1.0]


def test_default_schedules_fit_runs_of_any_length() -> None:
    for schedule in ("linear", "cosine", "constant", "wsd"):
        for total_steps in range(1, 101):
            found = rates(total_steps, schedule=schedule)
            assert max(found) == 1.0
            assert min(found) > 0.0


def test_rate_depends_on_nothing_but_the_step() -> None:
    schedule = build_schedule(OptimConfig(schedule="cosine"), 50)
    forwards = [schedule(step) for step in range(1, 51)]
    backwards = [schedule(step) for step in range(50, 0, -1)]
    assert forwards == backwards[::-1]
    assert schedule(51) == 0.0
    assert schedule(1000) == 0.0


def test_steps_of_warm_up_override_their_share() -> None:
    assert build_schedule(OptimConfig(warmup_share=0.5), 10).warmup_steps == 5
    assert build_schedule(OptimConfig(warmup_share=0.5, warmup_steps=1), 10).warmup_steps == 1
    assert build_schedule(OptimConfig(warmup_share=0.5, warmup_steps=0), 10).warmup_steps == 0


@pytest.mark.parametrize(
    ("options", "total_steps", "message"),
    [
        ({"schedule": "linear", "decay_share": 0.2}, 10, "--optim.decay_share has no effect on the linear schedule"),
        ({"schedule": "cosine", "decay_share": 0.2}, 10, "--optim.decay_share has no effect on the cosine schedule"),
        ({"schedule": "constant", "decay_share": 0.2}, 10, "--optim.decay_share has no effect on the constant"),
        ({"schedule": "constant", "final_share": 0.1}, 10, "--optim.final_share has no effect on the constant"),
        ({"schedule": "constant", "final_share": 0.0}, 10, "--optim.final_share has no effect on the constant"),
        ({"warmup_steps": 10}, 10, "a warm-up of 10 steps does not fit in 10 steps"),
        ({"warmup_steps": 11}, 10, "a warm-up of 11 steps does not fit in 10 steps"),
        (
            {"schedule": "wsd", "warmup_steps": 5, "decay_share": 0.6},
            10,
            "a warm-up of 5 steps and a decay of 6 does not fit in 10 steps",
        ),
    ],
)
def test_settings_that_cannot_take_effect(options: dict[str, object], total_steps: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_schedule(dataclasses.replace(OptimConfig(), **options), total_steps)  # type: ignore[arg-type]
    assert message in caught.value.message
    assert caught.value.remedy


# The parameters.


def test_vectors_do_not_decay() -> None:
    model = tiny_bert()
    decaying, plain = parameter_groups(model, 0.3)
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    group_of = {
        id(parameter): number
        for number, group in enumerate((decaying, plain))
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    sizes = [len(group["params"]) for group in (decaying, plain)]  # type: ignore[arg-type]
    assert len(group_of) == sum(sizes) == len(list(model.parameters()))
    names = {name: group_of[id(parameter)] for name, parameter in model.named_parameters()}
    assert {name for name, group in names.items() if group == 1} == {
        name for name in names if name.endswith(".bias") or "LayerNorm" in name
    }
    assert names["bert.embeddings.word_embeddings.weight"] == 0
    assert names["classifier.weight"] == 0


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1)
    assert group["weight_decay"] == 0.0
    assert len(group["params"]) == 2  # type: ignore[arg-type]


def test_adamw_takes_the_settings() -> None:
    model = nn.Linear(2, 2)
    config = OptimConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5)
    optimizer = adamw(model, config)
    for group, decay in zip(optimizer.param_groups, (0.5, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.1, (0.8, 0.9), 1e-3, True)
        assert group["weight_decay"] == decay


def test_adamw_step_by_hand() -> None:
    """One step of Loshchilov and Hutter 2019, algorithm 2, from a gradient of 2."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 3.0)
    nn.init.constant_(model.bias, 3.0)
    optimizer = adamw(model, OptimConfig(lr=0.1, eps=1e-8, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    # The first moments' estimates are 2 and 4, so both move by 0.1 × 2 / √4; the matrix decays by 0.1 × 0.5 × 3 too.
    assert model.weight.item() == pytest.approx(3.0 - 0.15 - 0.1)
    assert model.bias.item() == pytest.approx(3.0 - 0.1)
