"""Figures are written one way, and a missing one never breaks a line."""

from __future__ import annotations

import math

import pytest

from burnish.measure import formatting
from burnish.measure.formatting import (
    MISSING,
    format_bytes,
    format_column,
    format_count,
    format_divergence,
    format_milliseconds,
    format_rate,
    format_seconds,
    ratio,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1024, "1.00 KiB"),
        (11_912_000, "11.4 MiB"),
        (1024**3 - 1, "1.00 GiB"),
        (137 * 1024**2, "137 MiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_bytes_keep_three_figures_in_the_right_unit(value: int, text: str) -> None:
    assert format_bytes(value) == text


def test_counts_times_rates_and_divergences_read_as_people_write_them() -> None:
    assert format_count(7_069_000_000) == "7.07 B"
    assert format_count(812) == "812"
    assert format_milliseconds(1520) == "1.52 s"
    assert format_seconds(247) == "4 min 07 s"
    assert format_seconds(7380) == "2 h 03 min"
    assert format_rate(1203.6) == "1,204"
    assert format_divergence(0.0) == "0"
    assert format_divergence(4e-7) == "<0.0001"


def test_a_column_has_the_same_decimals_throughout() -> None:
    assert format_column([10.42, None, 3.9]) == ["10.4", MISSING, "3.9"]
    assert format_column([1033.2, 905.0]) == ["1,033", "905"]
    assert format_column([]) == []


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_every_format_writes_a_dash_for_what_is_missing(value: float | None) -> None:
    formats = [
        getattr(formatting, name)
        for name in dir(formatting)
        if name.startswith("format_") and name not in ("format_column", "format_interval")
    ]
    assert len(formats) >= 8
    assert {write(value) for write in formats} == {MISSING}
    assert formatting.format_interval(value, 0.5) == MISSING
    assert format_column([value]) == [MISSING]


def test_a_ratio_over_zero_or_nothing_is_missing() -> None:
    assert ratio(3, 0) is None
    assert ratio(None, 4) is None
    assert ratio(3, 4) == 0.75
