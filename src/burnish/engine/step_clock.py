"""How long steps took in all, and how many tokens came of the last ones. Torch-free."""

from __future__ import annotations

import time
from collections import deque

_SECONDS = 5.0


class StepClock:
    """Counts steps of one engine."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._recent: deque[tuple[float, float, int]] = deque()

    def count(self, started: float, *, tokens: int) -> float:
        """Note a step that began at `started` (of `time.perf_counter`) and ends now; returns its seconds."""
        now = time.perf_counter()
        self.total_s += now - started
        self._recent.append((started, now, tokens))
        while self._recent[0][1] < now - _SECONDS:
            self._recent.popleft()
        return now - started

    def tokens_per_s(self) -> float:
        """Tokens per second over the steps of the last seconds, idle time between and after them included."""
        now = time.perf_counter()
        recent = [entry for entry in tuple(self._recent) if entry[1] >= now - _SECONDS]
        return sum(tokens for _, _, tokens in recent) / (now - recent[0][0]) if recent else 0.0
