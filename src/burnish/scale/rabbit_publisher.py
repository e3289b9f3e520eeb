"""Sending items to RabbitMQ: mandatory, confirmed, many at once, and again whatever was not confirmed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from burnish.scale import rabbit
from burnish.scale.items import Key

T = TypeVar("T")

WINDOW = 256
_CONFIRM_S = 30.0


class RabbitPublisher:
    """A `Publisher` over one connection, which is made again when it is lost.

    A message counts as sent when the quorum queue has confirmed it. One whose confirmation was not heard is sent again,
    and may then be there twice; the result store keeps one result of it.

    Args:
        patience_s: how long nothing at all may get through.
        makes: the queues that are missing; without them nothing but `depths` may be asked.

    Raises:
        ConfigError: the URL is malformed, or the server refuses us.
        BurnishError: it cannot be reached.
        MissingExtraError: aio-pika is not installed.
    """

    def __init__(self, url: str, *, queue: str, patience_s: float = 15.0, makes: bool = True) -> None:
        rabbit.check_url(url)
        self._library = rabbit.load_library()
        self._url = url
        self._queue = queue
        self._patience_s = patience_s
        self._makes = makes
        self._connection: Any = None
        self._channel: Any = None
        self._queues: list[Any] = []
        self._dead: Any = None
        self._thread = rabbit.LoopThread("burnish-publisher")
        try:
            self._thread.run(self._patiently(self._opened))
        except BaseException:
            self.close()
            raise

    def publish(self, tickets: Sequence[tuple[Key, int]]) -> None:
        """See `Publisher.publish`."""
        self._thread.run(self._publish(list(tickets)))

    def unbury(self, keys: set[Key]) -> None:
        """See `Publisher.unbury`."""
        self._thread.run(self._patiently(lambda: self._unbury(keys)))

    def depths(self) -> dict[str, int]:
        """See `Publisher.depths`."""
        return self._thread.run(self._patiently(self._depths))

    def close(self) -> None:
        with suppress(Exception):
            self._thread.run(self._closed(), timeout_s=5)
        self._thread.close()

    async def _publish(self, left: list[tuple[Key, int]]) -> None:
        ends_s = time.monotonic() + self._patience_s
        pauses = rabbit.pauses()
        while left:
            window, error = left[:WINDOW], None
            try:
                await self._opened()
                names = rabbit.level_names(self._queue)
                answers = await asyncio.gather(
                    *[self._send(key, names[rank]) for key, rank in window], return_exceptions=True
                )
            except Exception as lost:
                answers, error = [lost] * len(window), lost
            failed = [ticket for ticket, answer in zip(window, answers) if isinstance(answer, BaseException)]
            left = failed + left[len(window) :]
            if len(failed) < len(window):
                ends_s, pauses = time.monotonic() + self._patience_s, rabbit.pauses()
            if failed:
                error = error or next(answer for answer in answers if isinstance(answer, BaseException))
                if not rabbit.may_pass(error):
                    raise error
                refused = rabbit.refusal(error, self._url)
                if refused is not None or time.monotonic() > ends_s:
                    raise (refused or rabbit.unreachable(error, self._url)) from error
                # A queue that vanished (mandatory: the message came back) is made again with the connection.
                await self._closed()
                await asyncio.sleep(next(pauses))

    async def _send(self, key: Key, name: str) -> None:
        message = self._library.Message(
            rabbit.to_body(key),
            delivery_mode=self._library.DeliveryMode.PERSISTENT,
            content_type="application/json",
            message_id=f"{key.job_id}/{key.item_id}",
        )
        await self._channel.default_exchange.publish(message, name, mandatory=True, timeout=_CONFIRM_S)

    async def _unbury(self, keys: set[Key]) -> None:
        await self._opened()
        others = []
        while (message := await self._dead.get(fail=False)) is not None:
            if rabbit.from_body(message.body) in keys:
                await message.ack()
            else:
                others.append(message)
        for message in others:
            await message.nack(requeue=True)

    async def _depths(self) -> dict[str, int]:
        await self._opened()
        names = [*rabbit.level_names(self._queue), rabbit.dead_name(self._queue)]
        found = [await rabbit.depth(self._connection, name) for name in names]
        return {level: count or 0 for level, count in zip((*rabbit.LEVELS, "dead"), found)}

    async def _opened(self) -> None:
        if self._channel is not None and not self._channel.is_closed and not self._connection.is_closed:
            return
        await self._closed()
        self._connection = await rabbit.connect(self._url, name="burnish queue submit")
        self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)
        if self._makes:
            self._queues, self._dead = await rabbit.declare(self._connection, self._channel, self._queue)

    async def _closed(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            with suppress(*rabbit.passing_errors()):
                await asyncio.wait_for(connection.close(), 2)

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        ends_s = time.monotonic() + self._patience_s
        pauses = rabbit.pauses()
        while True:
            done, error = await self._tried(work)
            if error is None:
                return done
            refused = rabbit.refusal(error, self._url)
            if refused is not None or time.monotonic() > ends_s:
                raise (refused or rabbit.unreachable(error, self._url)) from error
            await self._closed()
            await asyncio.sleep(next(pauses))

    async def _tried(self, work: Callable[[], Awaitable[T]]) -> tuple[Any, BaseException | None]:
        try:
            return await work(), None
        except Exception as error:
            if not rabbit.may_pass(error):
                raise
            return None, error
