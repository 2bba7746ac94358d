from __future__ import annotations

import math
import random

import pytest

from toolkit.numerics import ENOUGH, WINDOW, LossGuard


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_at_any_time(loss: float) -> None:
    assert "loss is" in LossGuard().refuse(loss)


def test_without_a_threshold_no_finite_loss_is_refused() -> None:
    guard = LossGuard()
    assert all(guard.refuse(loss) == "" for loss in [1.0] * 50 + [1e6])


def test_a_spike_is_refused_and_is_not_one_of_those_to_compare_with() -> None:
    noise = random.Random(0)
    guard = LossGuard(10)
    for _ in range(200):
        assert guard.refuse(2 + noise.gauss(0, 0.1)) == ""
    before = guard.recent
    assert "spike: 20" in guard.refuse(20.0)
    assert guard.recent == before
    assert len(before) == WINDOW


def test_a_falling_curve_a_warm_up_and_equal_losses_are_no_spikes() -> None:
    guard = LossGuard(10)
    assert all(guard.refuse(10 * 0.99**step) == "" for step in range(300))
    guard = LossGuard(10)
    assert all(guard.refuse(1.0) == "" for _ in range(60))
    assert guard.refuse(1.05) == ""  # rounding, not a spike
    assert guard.refuse(1.5) != ""


def test_there_is_nothing_to_compare_with_at_the_start() -> None:
    guard = LossGuard(5)
    assert all(guard.refuse(1.0) == "" for _ in range(ENOUGH - 1))
    assert guard.refuse(100.0) == ""


def test_it_goes_on_from_what_it_has_seen() -> None:
    noise, whole = random.Random(1), LossGuard(8)
    losses = [1 + noise.gauss(0, 0.05) for _ in range(90)] + [1.6]
    for loss in losses[:50]:
        whole.refuse(loss)
    cut = LossGuard(8, whole.recent)
    assert [whole.refuse(loss) for loss in losses[50:]] == [cut.refuse(loss) for loss in losses[50:]]
