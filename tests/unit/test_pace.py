"""Who holds the others up, and how long they waited."""

from __future__ import annotations

import pytest

from toolkit.pace import STEPS_BETWEEN_LOOKS, Pace


def test_a_slow_rank_is_named_every_few_steps() -> None:
    pace = Pace()
    found = [pace.note([0.1, 0.1, 0.5], 0.0) for _ in range(2 * STEPS_BETWEEN_LOOKS)]
    named = [look for look in found if look]
    assert [[rank for rank, _ in look] for look in named] == [[2], [2]]
    assert named[0][0][1] == pytest.approx(0.5)


def test_a_slow_minute_is_over_when_it_is_over() -> None:
    pace = Pace()
    for _ in range(STEPS_BETWEEN_LOOKS):
        pace.note([0.1, 0.1, 0.5], 0.0)
    assert not any(pace.note([0.1, 0.1, 0.1], 0.0) for _ in range(STEPS_BETWEEN_LOOKS))


def test_waiting_is_counted_step_by_step() -> None:
    """Ranks that are slow in turns look alike in the mean, and still wait for each other."""
    pace = Pace()
    for step in range(10):
        pace.note([0.1, 0.3] if step % 2 else [0.3, 0.1], 0.02 * (step % 2))
    assert pace.balance() == {"imbalance": pytest.approx(0.01), "waited": pytest.approx(1 / 3)}


def test_nothing_was_waited_for_where_nothing_was_done() -> None:
    assert Pace().balance() == {"imbalance": 0.0, "waited": 0.0}


def test_own_seconds_are_taken_once() -> None:
    pace = Pace()
    pace.add(0.25)
    pace.add(0.5)
    assert (pace.take(), pace.take()) == (0.75, 0.0)
