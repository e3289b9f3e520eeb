"""Running the SQL of answers on a database in memory, read-only, in a process that is killed when it takes too long."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from burnish.serve.child import Child

MAX_SHOWN_ROWS = 50
MAX_CELL_CHARS = 200
_TIMEOUT_S = 2.0
# Beyond the query's own limit, which SQLite looks at between its instructions only.
_PATIENCE_S = 5.0


class Query(NamedTuple):
    """What to run.

    Attributes:
        database: script that makes the tables and their rows.
        reference: SQL whose rows are the right ones, where that is known.
        ordered: the rows' order counts.
    """

    database: str
    sql: str
    reference: str | None = None
    ordered: bool = False
    timeout_s: float = _TIMEOUT_S


class Rows(NamedTuple):
    """What a query gave, ready to be shown.

    Attributes:
        rows: at most `MAX_SHOWN_ROWS`, each value as text; None for NULL.
        total: rows in all.
        error: one line, where the query did not run.
        right: the rows are the reference's; None where there is none.
        digest: equal for equal rows.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str | None, ...], ...] = ()
    total: int = 0
    error: str | None = None
    right: bool | None = None
    digest: str = ""


class SqlRunner:
    """Runs queries, one at a time."""

    def __init__(self, *, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._turn = asyncio.Lock()
        self._child: Child | None = None
        self._waiter: asyncio.Future[Rows | None] | None = None
        self._number = 0

    async def open(self) -> None:
        """Start the process, so that the first query need not wait for it."""
        async with self._turn:
            await self._started()

    async def run(self, query: Query) -> Rows:
        """The rows, or why there are none; never raises for what a query does."""
        async with self._turn:
            child = await self._started()
            if child is None:
                return Rows(error="the process that runs queries cannot be started")
            try:
                rows = await asyncio.wait_for(self._sent(child, query), query.timeout_s + self._patience_s)
            except asyncio.TimeoutError:
                await self._end()
                return Rows(error="took too long")
            except BaseException:
                await self._end()
                raise
            if rows is None:
                return Rows(error="the query took too much memory, or ended its process otherwise")
            return rows

    async def close(self) -> None:
        """End the process."""
        async with self._turn:
            await self._end()

    async def _sent(self, child: Child, message: Any) -> Rows | None:
        self._number += 1
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            child.send((self._number, message))
            return await self._waiter
        finally:
            self._waiter = None

    async def _started(self) -> Child | None:
        """The process, once it listens: how long its start takes is no query's fault."""
        if self._child is None:
            self._number = 0
            self._waiter = asyncio.get_running_loop().create_future()
            self._child = child = Child("burnish.serve.sql_worker", on_messages=self._take, on_end=self._died)
            try:
                await child.start("ready?")
                await self._waiter
            except OSError:
                self._child = None
            except BaseException:
                await self._end()
                raise
            finally:
                self._waiter = None
        return self._child

    async def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            await child.stop()

    def _take(self, messages: list[Any]) -> None:
        for number, rows in messages:
            if number == self._number and self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(rows)

    def _died(self) -> None:
        child, self._child = self._child, None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if child is not None:
            self._reaping = asyncio.ensure_future(child.reap())
