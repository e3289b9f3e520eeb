"""Submitting a job, and submitting items of it again. Repeating a call that was interrupted goes on where it ended."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.errors import BurnishError, DataError
from burnish.scale.brokers import Publisher
from burnish.scale.items import Item, digest_of, merged_params, read_items
from burnish.scale.rabbit import check_name
from burnish.scale.reading import read_keys
from burnish.scale.store import Job, JobStore
from burnish.scale.tables import DEAD, ERROR, PENDING, RUNNING

_PAGE = 500
RETRIED = {"failed": (ERROR, DEAD), "error": (ERROR,), "dead": (DEAD,), "unfinished": (PENDING, RUNNING)}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What a submission did: `published` items were sent now, `num_items` belong to the job."""

    job_id: str
    queue: str
    num_items: int
    published: int


def submit_file(
    store: JobStore,
    publisher: Publisher,
    path: Path,
    *,
    source: str,
    queue: str,
    params: Mapping[str, Any],
    job_id: str | None = None,
    rank: int = 1,
    as_chat: bool = False,
    max_attempts: int = 5,
    progress: Progress = lambda label, done, total: None,
) -> Submitted:
    """Check a whole file, store its items, and publish them; the file is read twice and never held in memory.

    When it returns every item is stored, and confirmed by the broker if there is one. The same call with the same
    `job_id` after an interruption adds what is missing.

    Args:
        path: of prompts, see `read_items`; `source` is what to call it.
        params: of every item, as `SamplingParams`.
        rank: of items that name no priority.

    Raises:
        DataError: a line is malformed, and nothing was stored; or the file changed meanwhile.
        RequestError: a parameter is out of range; nothing was stored.
        ConfigError: `job_id` is taken by another job.
    """
    merged_params(params, None)
    count, digest = digest_of(read_items(path, name=source, rank=rank, as_chat=as_chat), params)
    made_up = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    job = store.add_job(
        Job(
            job_id=made_up if job_id is None else check_name(job_id, what="--job"),
            queue=queue,
            source=source,
            digest=digest,
            params=params,
            max_attempts=max_attempts,
            num_items=count,
        )
    )
    try:
        if not job.complete:
            _store(store, job, read_items(path, name=source, rank=rank, as_chat=as_chat), progress)
        published = publish_waiting(store, publisher, job.job_id, total=count, progress=progress)
    except DataError:
        raise
    except BurnishError as error:
        remedy = f"Job {job.job_id} is there in part: repeat the command with --job {job.job_id} to add the rest."
        raise type(error)(error.what, got=error.got, expected=error.expected, remedy=remedy) from error
    return Submitted(job_id=job.job_id, queue=queue, num_items=count, published=published)


def _store(store: JobStore, job: Job, items: Iterator[Item], progress: Progress) -> None:
    first = 0
    while batch := list(itertools.islice(items, _PAGE)):
        store.add_items(job, first, batch)
        first += len(batch)
        progress("Storing", first, job.num_items)
    if first != job.num_items:
        raise DataError(f"{job.source} changed while it was read", got=f"{first} prompts", expected=job.num_items)
    store.complete_job(job.job_id)


def retry(
    store: JobStore,
    publisher: Publisher,
    job_id: str,
    *,
    which: str = "failed",
    progress: Progress = lambda label, done, total: None,
) -> int:
    """Let items of a job be done again, their results forgotten; returns how many.

    Args:
        which: "failed" (errors and dead ones), "error", "dead", or "unfinished" for those that a broker lost.

    Raises:
        ConfigError: there is no such job.
    """
    job = store.job(job_id)
    dead = read_keys(store.database, job.job_id, (DEAD,)) if which in ("failed", "dead") else set()
    count = store.reset(job.job_id, RETRIED[which])
    if dead:
        publisher.unbury(dead)
    publish_waiting(store, publisher, job.job_id, total=count, progress=progress)
    return count


def publish_waiting(
    store: JobStore,
    publisher: Publisher,
    job_id: str,
    *,
    total: int,
    progress: Progress = lambda label, done, total: None,
) -> int:
    """Publish items that wait and that no broker has confirmed; returns how many there were."""
    published = 0
    for page in store.unpublished(job_id):
        publisher.publish(page)
        store.mark_published(key for key, _ in page)
        published += len(page)
        progress("Publishing", published, total)
    return published
