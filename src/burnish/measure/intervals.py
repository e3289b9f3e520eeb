"""How sure a share or a sample of times is: Wilson's interval and percentiles. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share; never leaves 0..1 and stays honest near its ends.

    Wilson, 1927, JASA 22 (158), 209-212. No trials give (0, 1): nothing is known.

    Raises:
        ValueError: `successes` is not within 0..`trials`, or `confidence` not within (0, 1).
    """
    if not 0 <= successes <= trials or not 0 < confidence < 1:
        raise ValueError(f"wilson_interval of {successes} in {trials} at {confidence}")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    low = 0.0 if successes == 0 else (centre - margin) / scale
    high = 1.0 if successes == trials else (centre + margin) / scale
    return low, high


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which `share` (0..1) of the sample lies, between two neighbours where needed; None if empty."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """The three figures that a latency is reported by: p50, p90, p99."""
    return {name: percentile(values, share) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
