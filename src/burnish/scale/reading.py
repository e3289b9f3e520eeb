"""What came of a job: finished items in order, and those that failed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sql

from burnish.scale.database import Database
from burnish.scale.items import Key
from burnish.scale.tables import DEAD, DONE, ERROR, items, results

_PAGE = 1000


def read_results(database: Database, job_id: str, *, states: Sequence[str] = (DONE, ERROR, DEAD)) -> Iterator[Any]:
    """One flat mapping per item of these states, by item number; a page at a time is in memory.

    Keys: item, id (the row's own, if it had one), text, finish_reason, error, prompt_tokens, output_tokens, ttft_ms,
    e2e_ms, attempts, model; and with parameters that bring them choices, logprobs, prompt_logprobs, token_ids.
    """
    last = -1
    while True:
        query = (
            sql.select(items.c.item_id, items.c.name, items.c.attempts, items.c.state, items.c.worker, results)
            .outerjoin(results, (results.c.job_id == items.c.job_id) & (results.c.item_id == items.c.item_id))
            .where(items.c.job_id == job_id, items.c.item_id > last, items.c.state.in_(list(states)))
            .order_by(items.c.item_id)
            .limit(_PAGE)
        )
        rows = database.read(lambda connection, query=query: connection.execute(query).mappings().all())
        if not rows:
            return
        for row in rows:
            last = int(row[items.c.item_id])
            yield _flat(row)


def read_keys(database: Database, job_id: str, states: Sequence[str]) -> set[Key]:
    """The items of a job that are in these states."""
    query = sql.select(items.c.item_id).where(items.c.job_id == job_id, items.c.state.in_(list(states)))
    return {
        Key(job_id, int(number))
        for number in database.read(lambda connection: connection.execute(query).scalars().all())
    }


def _flat(row: Any) -> dict[str, Any]:
    error = row[results.c.error]
    if row[items.c.state] == DEAD:
        worker = row[items.c.worker]
        error = f"its worker died {row[items.c.attempts]} times, the last time {worker}"
    answer = json.loads(row[results.c.answer]) if row[results.c.answer] else {}
    return {
        "item": int(row[items.c.item_id]),
        "id": row[items.c.name],
        "text": answer.pop("text", None),
        "finish_reason": answer.pop("finish_reason", "error" if error else None),
        "error": error,
        "prompt_tokens": row[results.c.prompt_tokens],
        "output_tokens": row[results.c.output_tokens],
        **answer,
        "attempts": row[items.c.attempts],
        "model": row[results.c.model],
    }
