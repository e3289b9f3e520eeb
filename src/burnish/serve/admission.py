"""Who may come in: a bounded number of answers, counted in one place without a moment between look and take."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Literal

_REMEMBERED = 64
_LONGEST_WAIT_S = 60


class Busy(Exception):
    """There is no room now.

    Attributes:
        reason: "full" (429), or "not_ready", "draining" (503).
        retry_after_s: whole seconds after which a further try makes sense.
    """

    def __init__(self, reason: Literal["full", "not_ready", "draining"], message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after_s = retry_after_s


class Admission:
    """Counts answers from when they are let in until they end. For one event loop: nothing here waits.

    Args:
        max_running: answers computed at once.
        max_queue: answers that may wait.

    Attributes:
        held: answers let in and not ended.
        draining: nobody is let in any more.
    """

    def __init__(self, *, max_running: int, max_queue: int) -> None:
        self.max_running = max_running
        self.capacity = max_running + max_queue
        self.held = 0
        self.draining = False
        self._ended_s: deque[float] = deque(maxlen=_REMEMBERED)

    def enter(self, count: int, *, ready: bool) -> None:
        """Take room for `count` answers, all or none; with 0, see whether there is room for one.

        A request for more answers than there is room at all is let in when nobody else is.

        Raises:
            Busy: there is none.
        """
        if self.draining:
            raise Busy("draining", "the server is shutting down", 10)
        if not ready:
            raise Busy("not_ready", "the engine is not ready", 2)
        if self.held and self.held + max(count, 1) > self.capacity:
            raise Busy("full", "the queue is full", self._retry_after_s(self.held + max(count, 1) - self.capacity))
        self.held += count

    def leave(self, count: int) -> None:
        """Give room back."""
        assert 0 <= count <= self.held
        self.held -= count
        now_s = time.monotonic()
        self._ended_s.extend([now_s] * min(count, _REMEMBERED))

    def _retry_after_s(self, needed: int) -> int:
        """How long until so many places are free, at the rate at which the last answers ended."""
        if len(self._ended_s) < 2:
            return 1
        spread_s = max(time.monotonic() - self._ended_s[0], 1e-3)
        return min(_LONGEST_WAIT_S, max(1, math.ceil(needed * spread_s / len(self._ended_s))))


def answers(count: int) -> str:
    """ "1 answer", "2 answers"."""
    return "1 answer" if count == 1 else f"{count} answers"
