"""Models' SQL: it reads, within bounds, and nothing that it does reaches the server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from burnish.serve.compare_samples import samples
from burnish.serve.compare_sql import MAX_CELL_CHARS, MAX_SHOWN_ROWS, Query, Rows, SqlRunner
from burnish.serve.sql_worker import answer

DATABASE = "CREATE TABLE zoo (id INTEGER, name TEXT); INSERT INTO zoo VALUES (1, 'North'), (2, NULL), (3, 'South');"
NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {}) SELECT i FROM n"


def run(do: Callable[[SqlRunner], Awaitable[None]], *, patience_s: float = 60) -> None:
    async def opened() -> None:
        runner = SqlRunner(patience_s=patience_s)
        await runner.open()
        try:
            await do(runner)
        finally:
            await runner.close()

    asyncio.run(opened())


def test_rows_are_shown_with_their_columns() -> None:
    rows = answer(Query(DATABASE, "SELECT id, name AS n FROM zoo"))
    assert rows.columns == ("id", "n")
    assert rows.rows == (("1", "North"), ("2", None), ("3", "South"))
    assert rows.total == 3
    assert rows.right is None


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE zoo",
        "DELETE FROM zoo",
        "UPDATE zoo SET id = 1",
        "INSERT INTO zoo VALUES (4, 'x')",
        "CREATE TABLE more (id INTEGER)",
        "PRAGMA journal_mode = WAL",
        "SELECT load_extension('x')",
        "SELECT 1; SELECT 2",
        "",
        "What are the trails?",
    ],
)
def test_what_does_more_than_read_is_an_error(sql: str) -> None:
    rows = answer(Query(DATABASE, sql))
    assert rows.error
    assert "\n" not in rows.error
    assert rows.rows == ()


def test_no_file_is_written_by_database_or_query(tmp_path: Path) -> None:
    file = tmp_path / "out.db"
    assert answer(Query(DATABASE, f"ATTACH '{file}' AS other")).error
    assert answer(Query(f"ATTACH '{file}' AS other; {DATABASE}", "SELECT 1")).error
    assert answer(Query(DATABASE, f"VACUUM INTO '{file}'")).error
    assert not file.exists()


def test_many_rows_and_long_values_are_cut() -> None:
    rows = answer(Query("", NUMBERS.format(200)))
    assert (len(rows.rows), rows.total) == (MAX_SHOWN_ROWS, 200)
    [[cell]] = answer(Query("", "SELECT printf('%.*c', 5000, 'x')")).rows
    assert cell is not None
    assert len(cell) == MAX_CELL_CHARS + 1
    assert "more than" in str(answer(Query("", NUMBERS.format(20_000))).error)


def test_rows_are_held_against_the_references() -> None:
    sample = next(each for each in samples() if each.ordered)
    right = Query(sample.database, sample.answer, sample.answer, True)
    assert answer(right).right is True
    assert answer(right._replace(sql="SELECT 1")).right is False
    assert answer(right._replace(sql="SELECT nonsense")).right is False


def test_equal_rows_have_one_digest_in_any_order_unless_it_counts() -> None:
    up, down = (Query(DATABASE, f"SELECT id FROM zoo ORDER BY id {way}") for way in ("ASC", "DESC"))
    assert answer(up).digest == answer(down).digest
    assert answer(up._replace(ordered=True)).digest != answer(down._replace(ordered=True)).digest
    assert answer(up).digest != answer(Query(DATABASE, "SELECT id FROM zoo WHERE id > 1")).digest


def test_an_endless_query_ends_and_the_next_one_is_answered() -> None:
    async def do(runner: SqlRunner) -> None:
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT count(*) FROM n"
        rows = await runner.run(Query("", endless, timeout_s=0.2))
        assert rows == Rows(error="took too long")
        assert (await runner.run(Query("", "SELECT 7"))).rows == (("7",),)

    run(do)


def test_what_sqlite_does_not_interrupt_is_killed() -> None:
    # A search that takes ages within one of SQLite's own steps.
    stubborn = "SELECT instr(printf('%.*c', 9000000, 'a'), printf('%.*c', 900000, 'a') || 'b')"

    async def do(runner: SqlRunner) -> None:
        rows = await runner.run(Query("", stubborn, timeout_s=0.2))
        assert rows.error == "took too long"
        assert (await runner.run(Query("", "SELECT 7"))).rows == (("7",),)

    run(do, patience_s=0.5)


def test_a_query_that_takes_much_memory_fails_alone() -> None:
    async def do(runner: SqlRunner) -> None:
        hungry = (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2000) SELECT zeroblob(9000000)"
        )
        assert (await runner.run(Query("", f"{hungry} FROM n", timeout_s=30))).error
        assert (await runner.run(Query("", "SELECT 7"))).rows == (("7",),)

    run(do)


def test_a_process_that_was_killed_is_started_anew() -> None:
    async def do(runner: SqlRunner) -> None:
        assert runner._child is not None
        os.kill(runner._child.pid, signal.SIGKILL)
        first = await runner.run(Query("", "SELECT 7"))
        assert first.error or first.rows == (("7",),)
        assert (await runner.run(Query("", "SELECT 7"))).rows == (("7",),)

    run(do)
