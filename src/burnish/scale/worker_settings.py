"""How a worker works, and what it says it did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """How one worker works.

    Attributes:
        queue: whose items it takes.
        name: its own; no other worker may have it.
        model: what results are said to come from.
        slots: sequences that the engine runs at once.
        until_empty: end when every item of the queue has a result; otherwise wait for more.
        beat_s: seconds between signs of life, which also renew leases.
    """

    queue: str
    name: str
    model: str
    slots: int
    until_empty: bool = False
    beat_s: float = 5.0

    @property
    def room(self) -> int:
        """Items inside the engine: some wait there, so that a slot that falls free is taken in the same step."""
        return self.slots + max(2, self.slots // 2)

    @property
    def prefetch(self) -> int:
        """Items held in all; those that finish stay held until they are stored."""
        return 2 * self.room


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """What a worker did: items answered, items that failed, items it gave up, tokens and seconds."""

    done: int
    errors: int
    dead: int
    output_tokens: int
    seconds: float
