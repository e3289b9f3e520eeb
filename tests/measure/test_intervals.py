"""Intervals and percentiles against known values."""

from __future__ import annotations

import numpy as np
import pytest

from burnish.measure.intervals import percentile, percentiles, wilson_interval


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [  # Newcombe, 1998, Statistics in Medicine 17, table I (method 3); and the closed form at the ends
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval_equals_published_values(right: int, rows: int, low: float, high: float) -> None:
    assert wilson_interval(right, rows) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_of_nothing_says_that_nothing_is_known() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_refuses_more_successes_than_trials() -> None:
    with pytest.raises(ValueError, match="3 in 2"):
        wilson_interval(3, 2)


def test_percentiles_equal_numpy_on_an_unsorted_sample() -> None:
    values = [9.0, 1.0, 4.0, 16.0, 25.0, 2.0, 3.0]
    found = percentiles(values)
    for name, share in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert found[name] == pytest.approx(np.percentile(values, share))
    assert percentile([], 0.5) is None
    assert percentile([7.0], 0.99) == 7.0
