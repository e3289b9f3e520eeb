"""Who works: a row for each worker, which it renews, for `status` to show and for operators to look at."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from burnish.scale.database import Database
from burnish.scale.tables import RUNNING, items, workers

_FORGOTTEN_S = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class WorkerNote:
    """A worker as it last described itself; `silent_s` seconds ago."""

    name: str
    queue: str
    model: str
    host: str
    pid: int
    state: str
    running: int
    finished: int
    silent_s: float


def write_note(
    database: Database, *, name: str, queue: str, model: str, state: str, running: int, finished: int
) -> None:
    """Store what a worker does now; workers that were not heard of for a day are forgotten."""
    now_s = database.now_s()
    news: Mapping[str, Any] = {"state": state, "running": running, "finished": finished, "seen_s": now_s}

    def work(connection: Connection) -> None:
        change = sql.update(workers).where(workers.c.name == name).values(**news)
        if not connection.execute(change).rowcount:
            fixed = {
                "name": name,
                "queue": queue,
                "model": model[:255],
                "host": socket.gethostname()[:255],
                "pid": os.getpid(),
                "started_s": now_s,
            }
            connection.execute(database.insert_new(workers), fixed | news)
            connection.execute(sql.delete(workers).where(workers.c.seen_s < now_s - _FORGOTTEN_S))

    database.write(work)


def read_notes(database: Database, *, queue: str | None = None) -> list[WorkerNote]:
    """All workers known, or those of one queue."""
    query = sql.select(workers).order_by(workers.c.name)
    if queue is not None:
        query = query.where(workers.c.queue == queue)
    now_s = database.now_s()
    return [
        WorkerNote(
            name=row.name,
            queue=row.queue,
            model=row.model,
            host=row.host,
            pid=row.pid,
            state=row.state,
            running=row.running,
            finished=row.finished,
            silent_s=max(0.0, now_s - row.seen_s),
        )
        for row in database.read(lambda connection: connection.execute(query).all())
    ]


def held_by(database: Database, notes: Sequence[WorkerNote]) -> dict[str, int]:
    """Items that carry these workers' names and have no result: of a dead one, until others take them."""
    if not notes:
        return {}
    query = (
        sql.select(items.c.worker, sql.func.count().label("number"))
        .where(items.c.queue.in_({note.queue for note in notes}), items.c.state == RUNNING)
        .where(items.c.worker.in_([note.name for note in notes]))
        .group_by(items.c.worker)
    )
    rows = database.read(lambda connection: connection.execute(query).all())
    return {row.worker: row.number for row in rows}
