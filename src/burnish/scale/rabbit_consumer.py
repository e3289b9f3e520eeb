"""Receiving items from RabbitMQ: manual acknowledgement, a window per priority, and back again after any loss."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from burnish.errors import BurnishError
from burnish.scale import rabbit
from burnish.scale.brokers import Delivery

_LOOK_S = 15.0
_CLOSE_S = 10.0


class RabbitConsumer:
    """A `Consumer` over one connection, in a thread of its own that answers heartbeats whatever the engine does.

    Args:
        prefetch: unacknowledged messages of each priority.
        worker: what the connection is called on the server.
        patience_s: how long the server may be away.
        on_lost: told in words when the connection was lost, and when it is there again.

    Raises:
        ConfigError: the URL is malformed, or the server refuses us.
        BurnishError: it cannot be reached.
        MissingExtraError: aio-pika is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        queue: str,
        prefetch: int,
        worker: str,
        patience_s: float,
        on_lost: Callable[[str], None] = lambda text: None,
    ) -> None:
        rabbit.check_url(url)
        rabbit.load_library()
        self._url = url
        self._queue = queue
        self._prefetch = prefetch
        self._worker = worker
        self._patience_s = patience_s
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._received: list[Delivery] = []
        self._generation = 0
        self._connected = False
        self._closing = False
        self._failure: BurnishError | None = None
        self._settling: set[Any] = set()
        self._thread = rabbit.LoopThread("burnish-broker")
        self._lost = asyncio.Event()  # bound to the loop that first waits for it, which is the thread's
        self._serving = self._thread.start(self._serve())
        with self._changed:
            self._changed.wait_for(lambda: self._connected or self._failure is not None)
        if self._failure is not None:
            self.close()
            raise self._failure

    @property
    def ready(self) -> bool:
        with self._changed:
            return bool(self._received)

    def take(self, limit: int, *, timeout_s: float) -> list[Delivery]:
        """See `Consumer.take`. Raises BurnishError when the server was away for too long."""
        with self._changed:
            self._changed.wait_for(lambda: self._received or self._failure is not None, timeout_s)
            if self._failure is not None:
                raise self._failure
            taken, self._received = self._received[:limit], self._received[limit:]
        return taken

    def is_current(self, delivery: Delivery) -> bool:
        with self._changed:
            return self._connected and delivery.tag[0] == self._generation

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self._settle(deliveries, lambda message: message.ack())

    def release(self, deliveries: Sequence[Delivery]) -> None:
        self._settle(deliveries, lambda message: message.nack(requeue=True))

    def bury(self, deliveries: Sequence[Delivery]) -> None:
        """The queues' dead-letter routing brings them to the dead."""
        self._settle(deliveries, lambda message: message.reject(requeue=False))

    def renew(self) -> None:
        """The connection's heartbeats say it."""

    def close(self) -> None:
        """End the connection; whatever is unacknowledged is delivered again to others."""
        for future in list(self._settling):
            with suppress(Exception):
                future.result(_CLOSE_S)
        self._closing = True
        with suppress(RuntimeError):
            self._thread.loop.call_soon_threadsafe(self._lost.set)
        with suppress(Exception):
            self._serving.result(_CLOSE_S)
        self._thread.close()

    def _settle(self, deliveries: Sequence[Delivery], how: Callable[[Any], Any]) -> None:
        messages = [delivery.tag[1] for delivery in deliveries if self.is_current(delivery)]

        async def work() -> None:
            for message in messages:
                # Where the connection is lost meanwhile the message comes again, and its result is found stored.
                with suppress(*rabbit.passing_errors()):
                    await how(message)

        if messages:
            future = self._thread.start(work())
            self._settling.add(future)
            future.add_done_callback(self._settling.discard)

    async def _serve(self) -> None:
        try:
            await self._serve_patiently()
        except Exception as error:  # or the worker would wait for ever for what nobody receives
            failure = error if isinstance(error, BurnishError) else rabbit.unreachable(error, self._url)
            self._fail(failure)

    def _fail(self, failure: BurnishError) -> None:
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    async def _serve_patiently(self) -> None:
        pauses, ends_s = rabbit.pauses(), time.monotonic() + self._patience_s
        while not self._closing:
            connection, error = None, None
            self._lost.clear()
            try:
                connection = await rabbit.connect(self._url, name=f"burnish {self._worker}")
                await self._consume(connection)
                if self._generation > 1:
                    self._on_lost("the broker is there again")
                pauses = rabbit.pauses()
                await self._watch(connection)
            except Exception as lost:
                error = lost
            had = self._forget()
            if connection is not None:
                with suppress(*rabbit.passing_errors()):
                    await asyncio.wait_for(connection.close(), 3)
            if self._closing:
                return
            if error is not None and not rabbit.may_pass(error):
                raise error
            if had:
                ends_s = time.monotonic() + self._patience_s
                self._on_lost("the connection to the broker was lost")
            # A server that is starting may refuse what it will grant, so only the first refusal is believed.
            refused = rabbit.refusal(error, self._url) if error is not None and not self._generation else None
            if refused is not None or time.monotonic() > ends_s:
                self._fail(refused or rabbit.unreachable(error, self._url))
                return
            await asyncio.sleep(next(pauses))

    async def _consume(self, connection: Any) -> None:
        connection.close_callbacks.add(lambda *_: self._lost.set())
        generation = self._generation + 1
        first = await connection.channel(publisher_confirms=False)
        await rabbit.declare(connection, first, self._queue)
        consumers = []
        for rank, name in enumerate(rabbit.level_names(self._queue)):
            # A channel of its own for each: its window is then its own, and a full low one holds up no high one.
            channel = await connection.channel(publisher_confirms=False)
            channel.close_callbacks.add(lambda *_: self._lost.set())
            await channel.set_qos(prefetch_count=self._prefetch)
            consumers.append((await channel.get_queue(name, ensure=False), rank))
        with self._changed:
            self._generation, self._connected = generation, True
            self._changed.notify_all()
        for queue, rank in consumers:
            arrived = partial(self._arrived, rank=rank, generation=generation)
            await queue.consume(arrived, timeout=rabbit.ANSWER_S)

    async def _arrived(self, message: Any, rank: int, generation: int) -> None:
        key = rabbit.from_body(message.body)
        if key is None:
            with suppress(*rabbit.passing_errors()):
                await message.reject(requeue=False)
            return
        with self._changed:
            if generation == self._generation and self._connected:
                self._received.append(Delivery(key=key, rank=rank, tag=(generation, message)))
                self._changed.notify_all()

    async def _watch(self, connection: Any) -> None:
        """Until the connection or a channel is lost; a queue that was deleted is noticed by looking for it."""
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            while not (await asyncio.wait({lost}, timeout=_LOOK_S))[0]:
                channel = await connection.channel(publisher_confirms=False)
                for name in rabbit.level_names(self._queue):
                    await channel.declare_queue(name, passive=True, timeout=rabbit.ANSWER_S)
                await channel.close()
        finally:
            lost.cancel()

    def _forget(self) -> bool:
        """What was received and not acknowledged will come again; returns whether there was a connection."""
        with self._changed:
            had, self._connected = self._connected, False
            self._received = []
            return had
