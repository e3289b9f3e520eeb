"""Learning-rate factors."""

from __future__ import annotations

from itertools import pairwise

import pytest

from burnish.errors import ConfigError
from burnish.train.config import TrainConfig
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
    with pytest.raises(ConfigError, match=r"'cosin'.*linear, cosine, wsd, inverse-sqrt, constant"):
        rate_factor(1, total_steps=2, warmup=0, schedule="cosin")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize(("min_rate", "warmup"), [(0.1, 0), (0.25, 4), (0.1, 20)])
def test_last_step_runs_at_the_least_rate(schedule: str, min_rate: float, warmup: int) -> None:
    factors = [
        rate_factor(step, total_steps=20, warmup=warmup, schedule=schedule, min_rate=min_rate) for step in range(1, 21)
    ]
    assert max(factors) == 1.0
    assert all(later <= earlier for earlier, later in pairwise(factors[max(0, warmup - 1) :]))
    assert factors[-1] == pytest.approx(min_rate if warmup < 20 else 1.0)


def test_wsd_keeps_the_peak_and_falls_over_the_last_fifth() -> None:
    factors = [rate_factor(step, total_steps=50, warmup=5, schedule="wsd") for step in range(1, 51)]
    assert factors[4:41] == [1.0] * 37
    assert factors[41:] == pytest.approx([1 - done / 10 for done in range(1, 10)])


def test_inverse_sqrt_falls_from_the_peak_and_stops_at_the_floor() -> None:
    factors = [
        rate_factor(step, total_steps=9, warmup=4, schedule="inverse-sqrt", min_rate=0.4) for step in (1, 4, 9, 16, 99)
    ]
    assert factors == pytest.approx([0.25, 1.0, 2 / 3, 0.5, 0.4])


def test_least_rate_of_a_constant_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="constant schedule"):
        TrainConfig(schedule="constant", min_rate=0.1)
    with pytest.raises(ConfigError, match="min_rate is out of range"):
        TrainConfig(min_rate=1.0)
