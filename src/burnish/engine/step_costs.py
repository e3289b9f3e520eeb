"""How long a step of so many rows takes, learned from the steps that were run. Torch-free."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from statistics import median

# A step that nothing disturbed is the middle one of so many: one slow step changes nothing.
_KEPT = 5
# What a row more is taken to cost, as a share of the step, where no step of that size was seen: little, so that it is
# tried, and then it is known. (Cost may well jump between two sizes: a line between them would hide where.)
_GUESSED_ROW = 0.02


class StepCosts:
    """Seconds by number of rows: the median of the last steps of that size; of sizes not seen, a low guess."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._last: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}

    def observe(self, num_rows: int, seconds: float) -> None:
        """Note one step."""
        if num_rows not in self._last:
            insort(self._sizes, num_rows)
            self._last[num_rows] = deque(maxlen=_KEPT)
        self._last[num_rows].append(seconds)
        self._medians[num_rows] = median(self._last[num_rows])

    def seconds(self, num_rows: int) -> float:
        """What a step of this size takes; of the right order among sizes only, while none was seen."""
        if not self._sizes:
            return 1.0 + _GUESSED_ROW * num_rows
        known = self._medians.get(num_rows)
        if known is not None:
            return known
        place = bisect_left(self._sizes, num_rows)
        if place == 0:
            return self._medians[self._sizes[0]]
        below = self._sizes[place - 1]
        return self._medians[below] * (1.0 + _GUESSED_ROW * (num_rows - below))
