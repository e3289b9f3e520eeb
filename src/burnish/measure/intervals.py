"""How sure a share, a difference of two shares or a sample of times is. Torch-free."""

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


def paired_interval(lost: int, gained: int, pairs: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the drop in a share between two answers to the same questions, within -1..1.

    The adjusted Wald interval of paired proportions: Bonett and Price, 2012, J. Educ. Behav. Stat. 37 (4), 479-488.

    Args:
        lost, gained: questions that only the first, or only the second, answered right.
        pairs: questions.

    Raises:
        ValueError: the counts are negative or more than `pairs`, or `confidence` is not within (0, 1).
    """
    if min(lost, gained) < 0 or lost + gained > pairs or pairs < 1 or not 0 < confidence < 1:
        raise ValueError(f"paired_interval of {lost} lost and {gained} gained in {pairs} at {confidence}")
    first, second = ((count + 1) / (pairs + 2) for count in (lost, gained))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    margin = z * math.sqrt((first + second - (first - second) ** 2) / (pairs + 2))
    return max(-1.0, first - second - margin), min(1.0, first - second + margin)


def mcnemar_p(lost: int, gained: int) -> float:
    """How probable at least `lost` of the changed answers are if losing and gaining are equally likely: one-sided.

    The exact test of McNemar, 1947, Psychometrika 12 (2), 153-157. Nothing changed gives 1.

    Raises:
        ValueError: a count is negative.
    """
    if min(lost, gained) < 0:
        raise ValueError(f"mcnemar_p of {lost} lost and {gained} gained")
    changed = lost + gained
    return sum(math.comb(changed, count) for count in range(lost, changed + 1)) / 2**changed
