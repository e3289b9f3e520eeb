"""Jobs, their items and results, as workers and commands ask for them. Every call may be repeated without harm."""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from burnish.errors import ConfigError
from burnish.scale.database import Database
from burnish.scale.items import Item, Key
from burnish.scale.tables import DEAD, DONE, ERROR, FINISHED, PENDING, RUNNING, STATES, items, jobs, results

_PAGE = 500


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it was submitted.

    Attributes:
        source: what its file was called.
        digest: of its items and parameters.
        params: sampling parameters of every item.
        max_attempts: so often an item is begun before it is dead.
        complete: all of its items are stored.
        submitted_s: seconds since 1970.
    """

    job_id: str
    queue: str
    source: str
    digest: str
    params: Mapping[str, Any]
    max_attempts: int
    num_items: int
    complete: bool = False
    submitted_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An item as a worker needs it; `attempts` is how often it was begun before."""

    key: Key
    rank: int
    prompt: Any
    params: Mapping[str, Any] | None
    job_params: Mapping[str, Any]
    attempts: int
    max_attempts: int
    state: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of an item: an answer, or an error.

    Attributes:
        answer: text, finish_reason and timings; with several answers or log-probabilities, those too.
        error: why there is no answer.
    """

    key: Key
    answer: Mapping[str, Any] | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Items of a queue that are not done: those that wait (`unpublished` of them unknown to a broker), those begun."""

    pending: int = 0
    running: int = 0
    unpublished: int = 0

    @property
    def unfinished(self) -> int:
        return self.pending + self.running


@dataclass(kw_only=True)
class Counts:
    """Items of one job by state."""

    states: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATES, 0))

    def __getitem__(self, state: str) -> int:
        return self.states[state]

    @property
    def unfinished(self) -> int:
        return self[PENDING] + self[RUNNING]


class JobStore:
    """Everything the queue remembers, in one database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    # Submitting

    def add_job(self, job: Job) -> Job:
        """Store a job, or find the same one of an earlier attempt; returns it as it is stored.

        Raises:
            ConfigError: there is another job of this name.
        """
        row = {
            "job_id": job.job_id,
            "queue": job.queue,
            "source": job.source[:255],
            "digest": job.digest,
            "params": json.dumps(job.params),
            "max_attempts": job.max_attempts,
            "num_items": job.num_items,
            "complete": False,
            "submitted_s": self.database.now_s(),
        }
        self.database.write(lambda connection: connection.execute(self.database.insert_new(jobs), row))
        stored = self.job(job.job_id)
        if (stored.digest, stored.queue, stored.max_attempts) != (job.digest, job.queue, job.max_attempts):
            raise ConfigError(
                f"there is a job {job.job_id} already, of other prompts, parameters, queue or attempts",
                remedy="Choose another --job, or leave it out.",
            )
        return stored

    def add_items(self, job: Job, first: int, batch: Sequence[Item]) -> None:
        """Store items `first`, `first + 1`, ...; those that are there already stay as they are."""
        rows = [
            {
                "job_id": job.job_id,
                "item_id": number,
                "queue": job.queue,
                "priority_rank": item.rank,
                "submitted_s": job.submitted_s,
                "name": item.name,
                "prompt": json.dumps(item.prompt, ensure_ascii=False),
                "params": None if item.params is None else json.dumps(item.params),
                "state": PENDING,
                "attempts": 0,
                "published": False,
            }
            for number, item in enumerate(batch, first)
        ]
        self.database.write(lambda connection: connection.execute(self.database.insert_new(items), rows))

    def complete_job(self, job_id: str) -> None:
        """Note that all items are stored."""
        self.database.write(lambda connection: connection.execute(_update_job(job_id).values(complete=True)))

    def unpublished(self, job_id: str) -> Iterator[list[tuple[Key, int]]]:
        """Waiting items that no broker has confirmed yet, with their ranks, in pages."""
        last = -1
        while True:
            query = (
                sql.select(items.c.item_id, items.c.priority_rank)
                .where(items.c.job_id == job_id, items.c.item_id > last)
                .where(items.c.published.is_(False), items.c.state == PENDING)
                .order_by(items.c.item_id)
                .limit(_PAGE)
            )
            rows = self.database.read(lambda connection, query=query: connection.execute(query).all())
            if not rows:
                return
            yield [(Key(job_id, int(row.item_id)), int(row.priority_rank)) for row in rows]
            last = rows[-1].item_id

    def mark_published(self, keys: Iterable[Key]) -> None:
        self._write_each(keys, lambda where: sql.update(items).where(where).values(published=True))

    # Working

    def load(self, keys: Sequence[Key]) -> list[Loaded]:
        """Items by their keys, in no particular order; those that do not exist are left out."""

        def work(connection: Connection) -> list[Any]:
            rows = []
            for where in where_each(keys):
                query = (
                    sql.select(items, jobs.c.params.label("job_params"), jobs.c.max_attempts)
                    .join(jobs, jobs.c.job_id == items.c.job_id)
                    .where(where)
                )
                rows += connection.execute(query).all()
            return rows

        return [
            Loaded(
                key=Key(row.job_id, int(row.item_id)),
                rank=row.priority_rank,
                prompt=json.loads(row.prompt),
                params=None if row.params is None else json.loads(row.params),
                job_params=json.loads(row.job_params),
                attempts=row.attempts,
                max_attempts=row.max_attempts,
                state=row.state,
            )
            for row in self.database.read(work)
        ]

    def begin(self, keys: Sequence[Key], *, worker: str) -> None:
        """Count an attempt of each of these items, before anything is generated that might end this process."""
        token = uuid.uuid4().hex  # a transaction whose commit was not heard of is repeated, and counts once
        self._write_each(
            keys,
            lambda where: (
                sql.update(items)
                .where(where, items.c.state.in_((PENDING, RUNNING)))
                .where(sql.or_(items.c.token.is_(None), items.c.token != token))
                .values(attempts=items.c.attempts + 1, state=RUNNING, worker=worker, token=token)
            ),
        )

    def bury(self, keys: Sequence[Key]) -> None:
        """Give these items up: they were begun too often. A result that still arrives makes them done after all."""
        self._write_each(
            keys,
            lambda where: (
                sql.update(items)
                .where(where, items.c.state.in_((PENDING, RUNNING)))
                .values(state=DEAD, lease_until_s=None)
            ),
        )

    def commit(self, outcomes: Sequence[Outcome], *, worker: str, model: str) -> None:
        """Store results, each once: of an item that has one already the first stays."""
        now_s = self.database.now_s()
        rows = [
            {
                "job_id": outcome.key.job_id,
                "item_id": outcome.key.item_id,
                "error": outcome.error,
                "answer": None if outcome.answer is None else json.dumps(outcome.answer, ensure_ascii=False),
                "prompt_tokens": outcome.prompt_tokens,
                "output_tokens": outcome.output_tokens,
                "model": model[:255],
                "worker": worker,
                "finished_s": now_s,
            }
            for outcome in sorted(outcomes, key=lambda outcome: outcome.key)
        ]

        def work(connection: Connection) -> None:
            connection.execute(self.database.insert_new(results), rows)
            for state, keys in (
                (DONE, [outcome.key for outcome in outcomes if outcome.error is None]),
                (ERROR, [outcome.key for outcome in outcomes if outcome.error is not None]),
            ):
                for where in where_each(keys):
                    # Of two workers' results the first counts, in this table as in the other.
                    change = sql.update(items).where(where, items.c.state.not_in(FINISHED))
                    connection.execute(change.values(state=state, lease_until_s=None))

        self.database.write(work)

    def depth(self, queue: str) -> Depth:
        """How much there is to do, for scaling workers and for those that stop when there is nothing."""
        query = (
            sql.select(items.c.state, items.c.published, sql.func.count().label("number"))
            .where(items.c.queue == queue, items.c.state.in_((PENDING, RUNNING)))
            .group_by(items.c.state, items.c.published)
        )
        pending = running = unpublished = 0
        for row in self.database.read(lambda connection: connection.execute(query).all()):
            if row.state == RUNNING:
                running += row.number
            else:
                pending += row.number
                unpublished += 0 if row.published else row.number
        return Depth(pending=pending, running=running, unpublished=unpublished)

    def unfinished(self) -> dict[str, int]:
        """Items that wait or run, by queue; queues without any are left out."""
        query = (
            sql.select(items.c.queue, sql.func.count().label("number"))
            .where(items.c.state.in_((PENDING, RUNNING)))
            .group_by(items.c.queue)
            .order_by(items.c.queue)
        )
        rows = self.database.read(lambda connection: connection.execute(query).all())
        return {row.queue: row.number for row in rows}

    # Looking

    def job(self, job_id: str) -> Job:
        """One job.

        Raises:
            ConfigError: there is none of this name.
        """
        # MySQL compares no other characters with a name.
        found = self._jobs(jobs.c.job_id == job_id) if job_id.isascii() else []
        if not found:
            raise ConfigError(f"there is no job {job_id} in {self.database}", remedy="See: burnish queue status")
        return found[0]

    def jobs(self) -> list[Job]:
        """All jobs, the newest first."""
        return self._jobs(sql.true())

    def _jobs(self, where: Any) -> list[Job]:
        query = sql.select(jobs).where(where).order_by(jobs.c.submitted_s.desc(), jobs.c.job_id)
        return [
            Job(**{**row._mapping, "params": json.loads(row.params)})
            for row in self.database.read(lambda connection: connection.execute(query).all())
        ]

    def counts(self, job_ids: Sequence[str]) -> dict[str, Counts]:
        """Items by state, for each of these jobs."""
        counted = {job_id: Counts() for job_id in job_ids}
        query = (
            sql.select(items.c.job_id, items.c.state, sql.func.count().label("number"))
            .where(items.c.job_id.in_(list(job_ids)))
            .group_by(items.c.job_id, items.c.state)
        )
        for row in self.database.read(lambda connection: connection.execute(query).all()):
            counted[row.job_id].states[row.state] = row.number
        return counted

    # Retrying

    def reset(self, job_id: str, states: Sequence[str]) -> int:
        """Let items of these states wait again, their results and attempts forgotten; returns how many.

        They count as unpublished from now on, so `unpublished` lists them.
        """

        def work(connection: Connection) -> int:
            of_job = (items.c.job_id == job_id) & items.c.state.in_(list(states))
            gone = sql.select(items.c.item_id).where(of_job)
            connection.execute(sql.delete(results).where(results.c.job_id == job_id, results.c.item_id.in_(gone)))
            change = sql.update(items).where(of_job)
            return connection.execute(
                change.values(state=PENDING, attempts=0, published=False, token=None, worker=None, lease_until_s=None)
            ).rowcount

        return self.database.write(work)

    def _write_each(self, keys: Iterable[Key], statement: Any) -> None:
        listed = sorted(keys)

        def work(connection: Connection) -> None:
            for where in where_each(listed):
                connection.execute(statement(where))

        if listed:
            self.database.write(work)


def _update_job(job_id: str) -> Any:
    return sql.update(jobs).where(jobs.c.job_id == job_id)


def where_each(keys: Iterable[Key]) -> Iterator[Any]:
    """Conditions that together are these items: one for each job and page, always in the same order."""
    of_job: dict[str, list[int]] = defaultdict(list)
    for key in sorted(keys):
        of_job[key.job_id].append(key.item_id)
    for job_id, numbers in of_job.items():
        for start in range(0, len(numbers), _PAGE):
            yield (items.c.job_id == job_id) & items.c.item_id.in_(numbers[start : start + _PAGE])
