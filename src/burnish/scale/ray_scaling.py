"""How many workers a queue should have: grows at once, shrinks when it was too many for a while."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from burnish.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScalingRule:
    """Limits and times of scaling.

    A worker holds up to `items_per_worker` items; another one would find nothing to do before there are more than all
    that are there can hold. So wanted is `unfinished / items_per_worker`, rounded up, within the limits.

    Attributes:
        least, most: limits; the same number fixes it.
        items_per_worker: what one worker holds.
        shrink_after_s: so long fewer workers have to be wanted without a break, before the number falls to the most
            that were wanted in that time. A model takes a while to load, and a queue that runs empty often fills again.
    """

    least: int
    most: int
    items_per_worker: int
    shrink_after_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most or self.most < 1:
            got = f"{self.least} and {self.most}"
            raise ConfigError(
                "--min-workers and --max-workers do not fit", got=got, expected="0 <= min <= max, 1 <= max"
            )
        if not 0 <= self.shrink_after_s < 1e6:
            raise ConfigError("--shrink-after is out of range", got=self.shrink_after_s, expected="0 seconds or more")

    def wanted(self, unfinished: int) -> int:
        """Workers for so many items that wait or are begun."""
        return min(self.most, max(self.least, math.ceil(unfinished / self.items_per_worker)))


class Scaler:
    """Applies a rule over time.

    Args:
        now: workers at the beginning.
    """

    def __init__(self, rule: ScalingRule, *, now: int) -> None:
        self._rule = rule
        self.workers = min(rule.most, max(rule.least, now))
        self._wanted: deque[tuple[float, int]] = deque()

    def look(self, unfinished: int, now_s: float) -> int:
        """Take in a reading of the queue at a time; returns how many workers there should be."""
        wanted = self._rule.wanted(unfinished)
        if wanted >= self.workers:
            self.workers = wanted
            self._wanted.clear()
            return self.workers
        self._wanted.append((now_s, wanted))
        if now_s - self._wanted[0][0] >= self._rule.shrink_after_s:
            self.workers = max(count for _, count in self._wanted)
            self._wanted.clear()
        return self.workers
