"""What a broker is to a worker and to those who submit, and which one a command line names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from burnish.scale.items import Key


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """An item handed to one worker until it is acknowledged, given back, or the worker is gone.

    Attributes:
        rank: 0 runs first.
        tag: the broker's own; None where the key says all.
    """

    key: Key
    rank: int = 1
    tag: Any = None


class Consumer(Protocol):
    """The worker's side. Calls come from several threads.

    Attributes:
        ready: something was pushed to us, so that `take` has it at once; taken early it may overtake what waits.
    """

    @property
    def ready(self) -> bool: ...

    def take(self, limit: int, *, timeout_s: float) -> list[Delivery]:
        """Up to `limit` deliveries; waits for the first of them, and returns nothing when the time is over."""
        ...

    def is_current(self, delivery: Delivery) -> bool:
        """False when it was handed out again meanwhile: the connection or the lease it belonged to is gone."""
        ...

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Their results are stored: never deliver them again."""
        ...

    def release(self, deliveries: Sequence[Delivery]) -> None:
        """Give them back unbegun, to be delivered to anybody."""
        ...

    def bury(self, deliveries: Sequence[Delivery]) -> None:
        """Put them with the dead, where people look for them."""
        ...

    def renew(self) -> None:
        """Say that what this worker holds is still being worked on."""
        ...

    def close(self) -> None:
        """Give back whatever is held, and end."""
        ...


class Publisher(Protocol):
    """The side of those who submit."""

    def publish(self, tickets: Sequence[tuple[Key, int]]) -> None:
        """Send items with their ranks; returns when every one of them is safe with the broker.

        Raises:
            BurnishError: the broker could not be reached, or did not confirm, for too long.
        """
        ...

    def unbury(self, keys: set[Key]) -> None:
        """Take these from among the dead, as they are tried again."""
        ...

    def depths(self) -> dict[str, int]:
        """Messages that wait, by priority, and "dead" for those in the dead-letter queue."""
        ...

    def close(self) -> None: ...
