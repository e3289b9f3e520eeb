"""Learning-rate factors."""

from __future__ import annotations

from itertools import pairwise

import pytest

from burnish.errors import ConfigError
from burnish.train.schedule import rate_factor, warmup_steps


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_rises_to_one_and_falls_to_near_zero(schedule: str) -> None:
    factors = [rate_factor(step, total_steps=20, warmup=4, schedule=schedule) for step in range(1, 21)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(later < earlier for earlier, later in pairwise(factors[4:]))
    assert 0 < factors[-1] < 0.1


def test_constant_schedule_stays_at_one_after_warmup() -> None:
    assert [rate_factor(step, total_steps=9, warmup=2, schedule="constant") for step in (1, 2, 3, 9)] == [0.5, 1, 1, 1]


def test_warmup_is_a_share_or_a_number_of_steps() -> None:
    assert warmup_steps(0.03, 250) == 8
    assert warmup_steps(10, 250) == 10
    assert warmup_steps(0, 250) == 0


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'cosin'.*linear, cosine, constant"):
        rate_factor(1, total_steps=2, warmup=0, schedule="cosin")
