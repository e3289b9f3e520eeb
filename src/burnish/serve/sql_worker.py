"""The process that runs models' SQL: `python -m burnish.serve.sql_worker DESCRIPTOR`.

A query is a foreign program. An authorizer lets it read alone (`burnish.data.text_to_sql.execute`), and this process
keeps its time and memory from the server.
"""

from __future__ import annotations

import hashlib
import os

from burnish.data.text_to_sql.execute import QueryResult, Value, run_query, same_result
from burnish.serve.channel import take_line
from burnish.serve.compare_sql import MAX_CELL_CHARS, MAX_SHOWN_ROWS, Query, Rows

_MEMORY_BYTES = 1 << 30


def answer(query: Query) -> Rows:
    """Run one query; never raises for what a query does."""
    result = run_query(query.database, query.sql, timeout_s=query.timeout_s)
    right = None
    if query.reference is not None:
        gold = run_query(query.database, query.reference, timeout_s=query.timeout_s)
        right = same_result(gold, result, ordered=query.ordered)
    if result.rows is None:
        return Rows(error=(result.error or "it did not run")[:MAX_CELL_CHARS], right=right)
    return Rows(
        columns=tuple(_cell(name) or "" for name in result.columns),
        rows=tuple(tuple(_cell(value) for value in row) for row in result.rows[:MAX_SHOWN_ROWS]),
        total=len(result.rows),
        right=right,
        digest=_digest(result, ordered=query.ordered),
    )


def _cell(value: Value) -> str | None:
    """A value as it is shown; None for NULL."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = f"{value:.10g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_CELL_CHARS else f"{text[:MAX_CELL_CHARS]}…"


def _digest(result: QueryResult, *, ordered: bool) -> str:
    """Equal for equal rows; in any order, unless the question asks for one."""
    lines = [
        repr(tuple(round(value, 6) if isinstance(value, float) else value for value in row))
        for row in result.rows or []
    ]
    return hashlib.sha256("\n".join(lines if ordered else sorted(lines)).encode("utf-8", "replace")).hexdigest()


def main() -> int:
    line = take_line(memory_bytes=_MEMORY_BYTES)
    try:
        line.receive()
        line.send((0, None))
        while True:
            number, query = line.receive()
            try:
                rows = answer(query)
            except (MemoryError, RecursionError) as error:
                rows = Rows(error=f"the query failed: {type(error).__name__}")
            line.send((number, rows))
    except (EOFError, OSError):
        return 0


if __name__ == "__main__":
    os._exit(main())
