"""What a step costs is the middle of what was seen, and little more than a smaller one where nothing was."""

from __future__ import annotations

import pytest

from burnish.engine.step_costs import StepCosts


def test_one_disturbed_step_changes_nothing() -> None:
    costs = StepCosts()
    for seconds in (0.010, 0.011, 5.0, 0.010):
        costs.observe(1, seconds)
    assert costs.seconds(1) == pytest.approx(0.0105)


def test_the_past_is_forgotten() -> None:
    costs = StepCosts()
    for seconds in [0.01] * 20 + [0.03] * 3:
        costs.observe(1, seconds)
    assert costs.seconds(1) == 0.03


def test_a_size_not_seen_costs_little_more_than_the_next_smaller_one() -> None:
    costs = StepCosts()
    costs.observe(1, 0.010)
    costs.observe(5, 0.014)
    assert 0.010 < costs.seconds(2) < costs.seconds(4) < 0.011
    assert 0.014 < costs.seconds(9) < 0.016
    costs.observe(9, 0.030)
    assert 0.014 < costs.seconds(7) < 0.015


def test_a_smaller_size_than_any_seen_costs_no_less_than_the_smallest() -> None:
    costs = StepCosts()
    assert costs.seconds(1) < costs.seconds(9) < 1.2 * costs.seconds(1)
    costs.observe(4, 0.02)
    assert costs.seconds(1) == 0.02
