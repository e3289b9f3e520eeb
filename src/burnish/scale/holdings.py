"""What one worker holds: items that wait to begin, suspects that must run alone, and what the engine works on.

When a worker dies, any item that it had begun may have killed it. The first time that may have been chance, and they
run together again. Those that were begun twice without a result are suspects, and run alone from then on: the one that
kills its worker is then counted to death alone, and the others are done. A worker judges suspects only after it has
finished other items, or when there are no others, and begins with those that have the fewest attempts: where workers
die for reasons of their own, the blame is spread over many items, and none is counted to death. A suspect begins only
when every result before it is stored, and nothing begins before its own is: a death loses no answer beside its own.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from burnish.engine.sampling import SamplingParams
from burnish.scale.brokers import Delivery
from burnish.scale.items import Key
from burnish.scale.store import Loaded

ALONE_AFTER = 2


@dataclass(frozen=True, kw_only=True)
class Work:
    """An item that is ready for the engine."""

    loaded: Loaded
    params: SamplingParams

    @property
    def key(self) -> Key:
        return self.loaded.key


@dataclass(kw_only=True)
class Holdings:
    """Not safe for threads by itself; the worker's lock guards it.

    Attributes:
        room: most items inside the engine, those that wait there for a slot included.
        slots: sequences that the engine runs at once; beyond these, items begin some at a time.
        deliveries: of everything held; the newest where one was delivered again.
        inside: items begun that the engine is not done with.
        unstored: items that the engine is done with, whose results are not stored yet.
        alone: a suspect is inside or unstored, and nothing else may begin.
        finished: items that the engine got through since this worker began.
    """

    room: int
    slots: int
    deliveries: dict[Key, Delivery] = field(default_factory=dict)
    inside: set[Key] = field(default_factory=set)
    unstored: set[Key] = field(default_factory=set)
    alone: bool = False
    finished: int = 0
    _waiting: list[tuple[int, int, Work]] = field(default_factory=list)
    _suspects: list[tuple[int, int, Work]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._suspects)

    def new(self, deliveries: Iterable[Delivery]) -> list[Delivery]:
        """Note deliveries; returns those of items that are not held already."""
        fresh = [delivery for delivery in deliveries if delivery.key not in self.deliveries]
        self.deliveries.update({delivery.key: delivery for delivery in deliveries})
        return fresh

    def drop(self, keys: Iterable[Key]) -> list[Delivery]:
        """Hold these no longer; returns their deliveries."""
        gone = list(keys)
        self.unstored -= set(gone)
        self._end_alone()
        return [self.deliveries.pop(key) for key in gone if key in self.deliveries]

    def add(self, work: Work, *, suspect: bool | None = None) -> None:
        """Let it wait for its turn; whether it is a suspect is told by its attempts unless given."""
        attempts, most = work.loaded.attempts, work.loaded.max_attempts
        if suspect or (suspect is None and attempts >= min(ALONE_AFTER, most - 1) > 0):
            heapq.heappush(self._suspects, (attempts, next(self._order), work))
        else:
            heapq.heappush(self._waiting, (work.loaded.rank, next(self._order), work))

    def next_batch(self) -> list[Work]:
        """What may begin now, highest priority first; it counts as inside from now on."""
        if self.alone:
            return []
        if self._suspects and (self.finished >= self.room or not self._waiting):
            if self.inside or self.unstored:
                return []
            self.alone = True
            chosen = [heapq.heappop(self._suspects)[2]]
        else:
            free = self.room - len(self.inside)
            if 0 < free <= (self.room - self.slots) // 2:
                return []  # every slot is taken, and some wait for the next one
            count = min(free, len(self._waiting))
            chosen = [heapq.heappop(self._waiting)[2] for _ in range(count)]
        self.inside |= {work.key for work in chosen}
        return chosen

    def finish(self, keys: Iterable[Key]) -> None:
        """The engine is done with these; they are held until their results are stored, and dropped then."""
        done = set(keys)
        self.unstored |= done
        self.finished += len(done)
        self.leave(done)

    def leave(self, keys: Iterable[Key]) -> None:
        """These are inside the engine no longer."""
        self.inside -= set(keys)
        self._end_alone()

    def _end_alone(self) -> None:
        self.alone = self.alone and bool(self.inside or self.unstored)

    def give_up(self) -> list[Delivery]:
        """Hold nothing that waits any longer; returns it."""
        waiting = [work.key for _, _, work in (*self._waiting, *self._suspects)]
        self._waiting, self._suspects = [], []
        return self.drop(waiting)
