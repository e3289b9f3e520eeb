"""How figures are written for people: one way for bytes, counts, shares, times and what is missing.

Torch-free. Every function takes `None` (and NaN) for a figure that was not measured and answers with an en dash.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MISSING = "–"


def is_missing(value: float | None) -> bool:
    """Whether a figure was not measured, or came out as NaN or infinity."""
    return value is None or not math.isfinite(value)


def format_bytes(value: float | None) -> str:
    """Bytes in the unit that keeps three figures: `512 B`, `11.4 MiB`, `1.37 GiB`."""
    if value is None or is_missing(value):
        return MISSING
    sign = "-" if value < 0 else ""
    size = abs(float(value))
    if size < 1024:
        return f"{sign}{size:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1023.95 or unit == "TiB":
            return f"{sign}{_three_figures(size)} {unit}"
    raise AssertionError("the last unit always answers")


def format_column(values: Sequence[float | None], *, scale: float = 1.0) -> list[str]:
    """Bare numbers for one column, all with the same decimals; the heading carries the unit.

    Args:
        values: the figures; None is written as a dash.
        scale: what one unit of the heading holds (1024**2 for MiB).
    """
    known = [abs(value) / scale for value in values if value is not None and not is_missing(value)]
    highest, least = max(known, default=0.0), min((value for value in known if value), default=0.0)
    digits = 0 if highest >= 99.95 else 1 if highest >= 9.995 else 2
    if least < 0.95:
        digits = max(digits, 1)
    return [MISSING if value is None or is_missing(value) else f"{value / scale:,.{digits}f}" for value in values]


def format_count(value: float | None) -> str:
    """A count of things: `812`, `15.3 K`, `1.07 B`."""
    if value is None or is_missing(value):
        return MISSING
    size = float(value)
    if abs(size) < 1000:
        return f"{size:.0f}"
    for unit in ("K", "M", "B", "T"):
        size /= 1000
        if abs(size) < 999.95 or unit == "T":
            return f"{_three_figures(size)} {unit}"
    raise AssertionError("the last unit always answers")


def format_share(value: float | None, *, digits: int = 1) -> str:
    """A share in 0..1 as per cent: `87.3 %`."""
    if value is None or is_missing(value):
        return MISSING
    return f"{100 * value:.{digits}f} %"


def format_interval(low: float | None, high: float | None, *, digits: int = 1) -> str:
    """An interval of shares as per cent without the sign: `82.9–90.7`."""
    if low is None or high is None or is_missing(low) or is_missing(high):
        return MISSING
    return f"{100 * low:.{digits}f}–{100 * high:.{digits}f}"


def format_milliseconds(value: float | None) -> str:
    """Milliseconds: `8.41 ms`, `312 ms`, `1.52 s` above a second."""
    if value is None or is_missing(value):
        return MISSING
    if abs(value) >= 999.5:
        return f"{_three_figures(value / 1000)} s"
    return f"{_three_figures(value)} ms"


def format_seconds(value: float | None) -> str:
    """A duration: `0.42 s`, `93.1 s`, `4 min 07 s`, `2 h 03 min`."""
    if value is None or is_missing(value):
        return MISSING
    if value < 119.95:
        return f"{_three_figures(value)} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours} h {minutes:02d} min"


def format_rate(value: float | None) -> str:
    """Tokens per second as a number: `7.42`, `93.1`, `1,204`."""
    if value is None or is_missing(value):
        return MISSING
    return f"{value:,.0f}" if abs(value) >= 99.95 else _three_figures(value)


def format_divergence(value: float | None) -> str:
    """A KL divergence in nats: `0`, `<0.0001`, `0.0034`, `1.21`."""
    if value is None or is_missing(value):
        return MISSING
    if value == 0:
        return "0"
    if value < 0.0001:
        return "<0.0001"
    return f"{value:.4f}" if value < 0.1 else f"{value:.2f}"


def format_ratio(value: float | None) -> str:
    """A ratio: `0.97×`."""
    if value is None or is_missing(value):
        return MISSING
    return f"{value:.2f}×" if abs(value) < 99.995 else f"{value:,.0f}×"


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """`numerator / denominator`, or None when one is missing or the denominator is zero."""
    if numerator is None or denominator is None or is_missing(numerator) or is_missing(denominator):
        return None
    return numerator / denominator if denominator else None


def _three_figures(value: float) -> str:
    """Up to three significant figures without an exponent; zero stays `0`."""
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if magnitude < 99.95 else f"{value:.0f}"
