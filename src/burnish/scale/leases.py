"""The queue inside the database: items are leased to a worker, and come back when the lease is not renewed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from burnish.scale.brokers import Delivery
from burnish.scale.database import Database
from burnish.scale.items import Key
from burnish.scale.store import where_each
from burnish.scale.tables import PENDING, RUNNING, items

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5


class LeasingConsumer:
    """A `Consumer` over the items table, by SELECT ... FOR UPDATE SKIP LOCKED where the database has it.

    Args:
        worker: a name that no other worker has.
        lease_s: how long an item stays with a worker that is not heard of.
    """

    def __init__(self, database: Database, *, queue: str, worker: str, lease_s: float) -> None:
        self._database = database
        self._queue = queue
        self._worker = worker
        self._lease_s = lease_s
        self._held: set[Key] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._pause_s = 0.0

    @property
    def ready(self) -> bool:
        """A table pushes nothing."""
        return False

    def take(self, limit: int, *, timeout_s: float) -> list[Delivery]:
        """See `Consumer.take`; the table is looked at once at least, ever more rarely while nothing comes."""
        ends_s = time.monotonic() + timeout_s
        while True:
            left_s = ends_s - time.monotonic()
            if self._pause_s and left_s > 0:
                self._closed.wait(min(self._pause_s, left_s))
            taken = self._database.write(lambda connection: self._claim(connection, limit))
            with self._lock:
                self._held |= {delivery.key for delivery in taken}
            self._pause_s = 0.0 if taken else min(max(_FIRST_PAUSE_S, self._pause_s * 2), _LONGEST_PAUSE_S)
            if taken or time.monotonic() >= ends_s or self._closed.is_set():
                return taken

    def is_current(self, delivery: Delivery) -> bool:
        with self._lock:
            return delivery.key in self._held

    def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """The result's transaction ended the lease already."""
        self._forget(deliveries)

    def release(self, deliveries: Sequence[Delivery]) -> None:
        self._forget(deliveries)

        def work(connection: Connection) -> None:
            for where in where_each(delivery.key for delivery in deliveries):
                change = sql.update(items).where(where, items.c.worker == self._worker, items.c.state == RUNNING)
                connection.execute(change.values(state=PENDING, lease_until_s=None, worker=None))

        self._database.write(work)

    def bury(self, deliveries: Sequence[Delivery]) -> None:
        """Their state says it: `JobStore.bury` was called before."""
        self._forget(deliveries)

    def renew(self) -> None:
        """Prolong every lease held; those that somebody else took over meanwhile are not ours any more."""
        with self._lock:
            held = sorted(self._held)
        until_s = self._database.now_s() + self._lease_s

        def work(connection: Connection) -> set[Key]:
            ours: set[Key] = set()
            for where in where_each(held):
                mine = where & (items.c.worker == self._worker) & (items.c.state == RUNNING)
                connection.execute(sql.update(items).where(mine).values(lease_until_s=until_s))
                rows = connection.execute(sql.select(items.c.job_id, items.c.item_id).where(mine))
                ours |= {Key(row.job_id, int(row.item_id)) for row in rows}
            return ours

        ours = self._database.write(work)
        with self._lock:
            self._held -= set(held) - ours

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            held = [Delivery(key=key) for key in self._held]
        if held:
            self.release(held)

    def _forget(self, deliveries: Sequence[Delivery]) -> None:
        with self._lock:
            self._held -= {delivery.key for delivery in deliveries}

    def _claim(self, connection: Connection, limit: int) -> list[Delivery]:
        now_s = self._database.now_s()
        of_queue = items.c.queue == self._queue
        columns = sql.select(items.c.job_id, items.c.item_id, items.c.priority_rank)
        lapsed = (
            columns.where(of_queue, items.c.state == RUNNING, items.c.lease_until_s < now_s)
            .order_by(items.c.lease_until_s)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        rows = list(connection.execute(lapsed).all())
        if len(rows) < limit:
            waiting = (
                columns.where(of_queue, items.c.state == PENDING)
                .order_by(items.c.priority_rank, items.c.submitted_s, items.c.item_id)
                .limit(limit - len(rows))
                .with_for_update(skip_locked=True)
            )
            rows += connection.execute(waiting).all()
        taken = [Delivery(key=Key(row.job_id, int(row.item_id)), rank=row.priority_rank) for row in rows]
        for where in where_each(delivery.key for delivery in taken):
            connection.execute(
                sql.update(items)
                .where(where)
                .values(state=RUNNING, worker=self._worker, lease_until_s=now_s + self._lease_s)
            )
        return taken


class NoPublisher:
    """The `Publisher` of a queue that is the database itself: what is stored is published."""

    def publish(self, tickets: Sequence[tuple[Key, int]]) -> None:
        return

    def unbury(self, keys: set[Key]) -> None:
        return

    def depths(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        return
