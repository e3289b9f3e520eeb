"""RabbitMQ: the queues that a burnish queue is made of, and the thread that speaks with the server.

A queue NAME is three quorum queues, burnish.NAME.high, .normal and .low (quorum queues of RabbitMQ 3 have no priorities
of their own), and burnish.NAME.dead for the dead. A message is the key of an item; what it asks lies in the database.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import threading
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from burnish._optional import require
from burnish.errors import BurnishError, ConfigError
from burnish.scale.items import PRIORITIES, Key

T = TypeVar("T")

LEVELS = tuple(reversed(PRIORITIES))  # by rank
HEARTBEAT_S = 20
CONNECT_S = 10.0
ANSWER_S = 30.0
# RabbitMQ 3.10 that was killed right after a quorum queue was declared came back without its messages, confirmed ones
# too (both times that this was tried after 0 s; not after 1.5 s and 4 s, tried once each).
SETTLE_S = 4.0
# Redeliveries of items that were never begun count here as well, so this bounds a loop and judges nobody: attempts do,
# and those are counted in the database.
DELIVERY_LIMIT = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


def load_library() -> Any:
    """aio-pika, whose warnings about lost connections stay out of the terminal: we reconnect.

    Raises:
        MissingExtraError: it is not installed.
    """
    library = require("aio_pika", extra="queue")
    for name in ("aio_pika", "aiormq"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
    return library


def check_name(name: str, *, what: str) -> str:
    """A name that every broker and database takes.

    Raises:
        ConfigError: it is none.
    """
    if not _NAME.match(name):
        raise ConfigError(f"{what} is malformed", got=repr(name), expected="letters, digits, dots, dashes; at most 64")
    return name


def level_names(queue: str) -> list[str]:
    """The queues of the priorities, by rank."""
    return [f"burnish.{queue}.{level}" for level in LEVELS]


def dead_name(queue: str) -> str:
    return f"burnish.{queue}.dead"


def check_url(url: str) -> None:
    """Raises ConfigError unless it is an AMQP URL."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("amqp", "amqps") and bool(parts.hostname) and parts.port != 0 and " " not in url
    except ValueError:
        good = False
    if not good:
        raise _malformed(None)


def _malformed(error: Exception | None) -> ConfigError:
    expected = "amqp://USER:PASSWORD@HOST:PORT/VHOST, or amqps://..."
    return ConfigError("--broker is malformed", got=error, expected=expected)


def hidden(url: str) -> str:
    """The URL without its password, for messages."""
    return re.sub(r"(//[^:/@]*):[^@/]*@", r"\1:***@", url)


async def connect(url: str, *, name: str) -> Any:
    """One connection that does not mend itself: whoever holds it knows what has to be done again.

    Raises:
        ConfigError: the URL is malformed.
        Exception: one of `passing_errors`.
    """
    library = load_library()
    from yarl import URL

    try:
        address = URL(url)
        address = address.update_query({"heartbeat": str(HEARTBEAT_S), "name": name, **address.query})
        connection = library.Connection(address)
    except ValueError as error:
        raise _malformed(error) from error
    try:
        await connection.connect(timeout=CONNECT_S)
    except UnicodeError as error:  # a host that no name server could be asked for
        await connection.close()
        raise _malformed(error) from error
    except BaseException:
        await connection.close()  # or it would try to when it is collected, in whatever thread that is
        raise
    return connection


async def declare(connection: Any, channel: Any, queue: str) -> tuple[list[Any], Any]:
    """Make what is missing of the queues; returns those of the priorities by rank, and that of the dead.

    Queues made now are left alone for `SETTLE_S` before anything is put into them.
    """
    missing = False
    for name in (*level_names(queue), dead_name(queue)):
        missing = missing or await depth(connection, name) is None
    options = {"durable": True, "timeout": ANSWER_S}
    dead = await channel.declare_queue(dead_name(queue), arguments={"x-queue-type": "quorum"}, **options)
    arguments = {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead_name(queue),
        "x-delivery-limit": DELIVERY_LIMIT,
    }
    levels = [await channel.declare_queue(name, arguments=arguments, **options) for name in level_names(queue)]
    if missing:
        await asyncio.sleep(SETTLE_S)
    return levels, dead


async def depth(connection: Any, name: str) -> int | None:
    """Messages that wait in a queue; None where there is no such queue."""
    channel = await connection.channel(publisher_confirms=False)
    try:
        queue = await channel.declare_queue(name, passive=True, timeout=ANSWER_S)
    except load_library().exceptions.ChannelNotFoundEntity:
        return None  # and the server closed the channel
    await channel.close()
    return queue.declaration_result.message_count


def to_body(key: Key) -> bytes:
    return json.dumps({"job": key.job_id, "item": key.item_id}).encode()


def from_body(body: bytes) -> Key | None:
    """None when it is no message of ours."""
    try:
        row = json.loads(body)
        job, item = row["job"], row["item"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return Key(job, item) if isinstance(job, str) and type(item) is int else None


def passing_errors() -> tuple[type[BaseException], ...]:
    """What reconnecting may mend."""
    return (*load_library().exceptions.CONNECTION_EXCEPTIONS, asyncio.TimeoutError)


def may_pass(error: BaseException) -> bool:
    """Whether reconnecting may mend it; what waits while a connection ends without a reason gets a bare Exception."""
    return isinstance(error, passing_errors()) or type(error) is Exception


def refusal(error: BaseException, url: str) -> BurnishError | None:
    """The error to end with where the server answered and does not want us."""
    import aiormq.exceptions

    refused = (
        aiormq.exceptions.AuthenticationError,
        aiormq.exceptions.ProbableAuthenticationError,
        aiormq.exceptions.ConnectionNotAllowed,
        aiormq.exceptions.ChannelAccessRefused,
        aiormq.exceptions.ChannelPreconditionFailed,
    )
    if isinstance(error, refused):
        said = " ".join(str(error).split()) or type(error).__name__
        return ConfigError(f"the broker {hidden(url)} refuses us", got=said)
    return None


def unreachable(error: BaseException | None, url: str) -> BurnishError:
    """The error to end with where nothing helped."""
    said = " ".join(str(error).split()) or type(error).__name__
    if "Connection.Close" in said:
        remedy = "Is there such a virtual host, and may the user have it?"
        return BurnishError(f"the broker {hidden(url)} ends the connection as it begins", remedy=remedy)
    return BurnishError(
        f"the broker {hidden(url)} does not answer", got=said, remedy="Is RabbitMQ running, and the URL right?"
    )


def pauses(first_s: float = 0.1, longest_s: float = 5.0) -> Any:
    """Waiting times that grow, spread out so that many do not come back at the same moment."""
    pause_s = first_s
    while True:
        yield pause_s * random.uniform(0.5, 1.5)
        pause_s = min(pause_s * 2, longest_s)


class LoopThread:
    """An event loop in a thread of its own, so that heartbeats go on whatever the others do."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], *, timeout_s: float | None = None) -> T:
        """Do this over there and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def start(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do this over there; the future may be ignored."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        """Cancel what still runs, and end the thread."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            left: Sequence[asyncio.Task[Any]] = list(asyncio.all_tasks(self.loop))
            for task in left:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()
