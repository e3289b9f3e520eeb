"""From what a command line names, a database and perhaps a broker, to stores, publishers and consumers."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from burnish.errors import ConfigError
from burnish.scale.brokers import Publisher
from burnish.scale.database import Database
from burnish.scale.leases import LeasingConsumer, NoPublisher
from burnish.scale.rabbit import check_name, check_url
from burnish.scale.store import JobStore
from burnish.scale.worker import SteppedEngine, Worker
from burnish.scale.worker_settings import WorkerSettings

DEFAULT_STORE = "sqlite:///burnish-queue.db"
COMMAND_PATIENCE_S = 15.0
WORKER_PATIENCE_S = 600.0
MIN_LEASE_S = 3.0


@dataclass(frozen=True, kw_only=True)
class QueueAddress:
    """Where a queue is: its database, its broker if it has one, and its name. A plain value, for other processes.

    Raises:
        ConfigError: the name or the broker's URL is malformed.
    """

    store: str = DEFAULT_STORE
    broker: str | None = None
    queue: str = "default"

    def __post_init__(self) -> None:
        check_name(self.queue, what="--queue")
        if self.broker is not None:
            check_url(self.broker)


@contextmanager
def open_store(
    address: QueueAddress, *, patience_s: float = COMMAND_PATIENCE_S, makes: bool = True
) -> Iterator[JobStore]:
    """The queue's database, its tables made where they are missing.

    Args:
        makes: the file of SQLite too; without it a file that is not there is an error.

    Raises:
        ConfigError, BurnishError, MissingExtraError: see `Database`.
    """
    database = Database(address.store, patience_s=patience_s)
    file = str(database.url.database)
    if not makes and database.kind == "sqlite" and not (file.startswith("file:") or Path(file).exists()):
        raise ConfigError(f"there is no queue in {database}", remedy="Give --store as it was given to submit.")
    try:
        database.open()
        yield JobStore(database)
    finally:
        database.close()


@contextmanager
def open_publisher(
    address: QueueAddress, *, patience_s: float = COMMAND_PATIENCE_S, makes: bool = True
) -> Iterator[Publisher]:
    """The queue's broker, to send to; without one the database is the queue.

    Args:
        makes: the broker's queues, where they are missing; without it only `depths` may be asked.

    Raises:
        ConfigError, BurnishError, MissingExtraError: see `RabbitPublisher`.
    """
    publisher: Publisher = NoPublisher()
    if address.broker is not None:
        from burnish.scale.rabbit_publisher import RabbitPublisher

        publisher = RabbitPublisher(address.broker, queue=address.queue, patience_s=patience_s, makes=makes)
    try:
        yield publisher
    finally:
        publisher.close()


@contextmanager
def open_worker(
    address: QueueAddress,
    open_engine: Callable[[], SteppedEngine],
    *,
    model: str,
    slots: int,
    name: str | None = None,
    until_empty: bool = False,
    lease_s: float = 60.0,
    patience_s: float = WORKER_PATIENCE_S,
    start_patience_s: float = COMMAND_PATIENCE_S,
    progress: Callable[[int], None] = lambda count: None,
    say: Callable[[str], None] = lambda text: None,
    make: type[Worker] = Worker,
) -> Iterator[Worker]:
    """A worker for this queue, ready to `run`. The queue is reached before the engine is loaded.

    Args:
        open_engine: loads an engine of `slots` slots; the rooms above know how.
        model: what results are said to come from.
        name: made up when not given.
        lease_s: how long items stay with a worker that is not heard of; a broker's connection tells it at once.
        patience_s: how long the database or the broker may be away while it works.
        start_patience_s: how long before it begins.
        say: told in words when the broker was lost and found.
        make: the class of the worker.

    Raises:
        ConfigError: the lease is too short; or as `open_store`.
    """
    if lease_s < MIN_LEASE_S:
        raise ConfigError("lease is out of range", got=lease_s, expected=f"{MIN_LEASE_S:g} seconds or more")
    name = name or f"{socket.gethostname()[:40]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    settings = WorkerSettings(
        queue=address.queue,
        name=name,
        model=model,
        slots=slots,
        until_empty=until_empty,
        beat_s=min(5.0, lease_s / 3),
    )
    with open_store(address, patience_s=start_patience_s) as store:
        if address.broker is not None:
            with open_publisher(address, patience_s=start_patience_s):
                pass  # the broker answers, before anything large is loaded
        engine = open_engine()
        store.database.patience_s = patience_s
        if address.broker is None:
            consumer = LeasingConsumer(store.database, queue=address.queue, worker=name, lease_s=lease_s)
        else:
            from burnish.scale.rabbit_consumer import RabbitConsumer

            consumer = RabbitConsumer(
                address.broker,
                queue=address.queue,
                prefetch=settings.prefetch,
                worker=name,
                patience_s=patience_s,
                on_lost=say,
            )
        yield make(engine, store=store, consumer=consumer, settings=settings, progress=progress)
