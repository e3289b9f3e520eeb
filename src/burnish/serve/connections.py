"""Connections of a running server: those whose reader takes nothing are cut off, and those on which nobody asks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from burnish.serve.settings import ServeSettings


class CountingTransport:
    """An asyncio transport that knows how many bytes it was given to send."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self.num_written = 0

    def write(self, data: bytes) -> None:
        self.num_written += len(data)
        self._transport.write(data)

    def writelines(self, parts: Iterable[bytes]) -> None:
        self.write(b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def counting(protocol: Any) -> Any:
    """uvicorn's protocol class with a transport that counts."""

    class Counting(protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(CountingTransport(transport))

    return Counting


class Watched:
    """What was last seen of one connection.

    Args:
        now_s: on the monotonic clock.
    """

    def __init__(self, now_s: float) -> None:
        self._taken = 0
        self._moved_s = now_s
        self._asked_s = now_s

    def look(self, now_s: float, *, written: int, waiting: int, asked: bool, settings: ServeSettings) -> str | None:
        """Why the connection is to be cut, "slow_reader" or "idle"; None where it is not.

        Args:
            written: bytes given to its transport so far.
            waiting: those of them that the system has not taken, as its own buffers are full.
            asked: a request is being answered.
        """
        taken = written - waiting
        if not waiting or taken > self._taken:
            self._moved_s = now_s
        self._taken = taken
        if waiting or asked:
            self._asked_s = now_s
        if now_s - self._moved_s > settings.slow_reader_timeout_s:
            return "slow_reader"
        return "idle" if now_s - self._asked_s > settings.idle_timeout_s else None


async def cut_off(connections: set[Any], settings: ServeSettings, count: Any) -> None:
    """Watch uvicorn's connections for as long as this is not cancelled.

    Args:
        connections: the protocols of those that are open, made by a `counting` class.
        count: Prometheus's counter, by reason.
    """
    watched: dict[Any, Watched] = {}
    loop = asyncio.get_running_loop()
    step_s = min(1.0, settings.slow_reader_timeout_s / 4, settings.idle_timeout_s / 4)
    while True:
        await asyncio.sleep(step_s)
        now_s = loop.time()
        alive = set(connections)
        for gone in watched.keys() - alive:
            del watched[gone]
        for protocol in alive:
            transport = protocol.transport
            seen = watched.setdefault(protocol, Watched(now_s))
            reason = seen.look(
                now_s,
                written=transport.num_written,
                waiting=transport.get_write_buffer_size(),
                asked=_is_asked(protocol),
                settings=settings,
            )
            if reason is not None:
                count.labels(reason).inc()
                transport.abort()


def _is_asked(protocol: Any) -> bool:
    """A request of this connection is being answered."""
    cycle = getattr(protocol, "cycle", None)
    return cycle is not None and not cycle.response_complete
