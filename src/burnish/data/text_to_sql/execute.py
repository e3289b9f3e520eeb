"""Running a model's SQL safely, and deciding whether it answers the question.

The database is built in memory from a script, then only SELECT is allowed: an authorizer refuses writes, ATTACH and
PRAGMA, and a progress handler ends a query that takes too long.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from collections import Counter
from dataclasses import dataclass

MAX_ROWS = 10_000
_STEPS_BETWEEN_CHECKS = 1_000
_READING = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE})
_BUILDING_REFUSED = frozenset({sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA})
_REFUSED_FUNCTIONS = frozenset({"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"})

Value = str | int | float | bytes | None


@dataclass(frozen=True, kw_only=True)
class QueryResult:
    """Rows of a query that ran with the names of their columns, or the reason why it did not."""

    rows: list[tuple[Value, ...]] | None = None
    error: str | None = None
    columns: tuple[str, ...] = ()


def _refuses_function(action: int, first: str | None, second: str | None) -> bool:
    return action == sqlite3.SQLITE_FUNCTION and (second or first or "").lower() in _REFUSED_FUNCTIONS


def _authorize_building(
    action: int, first: str | None, second: str | None, _database: str | None, _by: str | None
) -> int:
    refused = action in _BUILDING_REFUSED or _refuses_function(action, first, second)
    return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK


def _authorize_reading(
    action: int, first: str | None, second: str | None, _database: str | None, _by: str | None
) -> int:
    allowed = action in _READING and not _refuses_function(action, first, second)
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def run_query(database: str, sql: str, *, timeout_s: float = 2.0) -> QueryResult:
    """Build an in-memory SQLite database and run one SELECT on it.

    Args:
        database: script of CREATE TABLE and INSERT statements; it cannot attach files or set pragmas.
        sql: untrusted query; one statement, read-only.
        timeout_s: seconds for building and query together.

    Returns:
        the rows (at most `MAX_ROWS`), or one line saying why there are none.
    """
    connection = sqlite3.connect(":memory:")
    try:
        if sys.version_info >= (3, 11):
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000_000)
        connection.execute("PRAGMA trusted_schema = OFF")
        deadline = time.monotonic() + timeout_s
        connection.set_progress_handler(lambda: int(time.monotonic() > deadline), _STEPS_BETWEEN_CHECKS)
        connection.set_authorizer(_authorize_building)
        connection.executescript(database)
        connection.set_authorizer(_authorize_reading)
        cursor = connection.execute(sql)
        rows = cursor.fetchmany(MAX_ROWS + 1)
        if cursor.description is None:
            return QueryResult(error="not a SELECT statement")
        if len(rows) > MAX_ROWS:
            return QueryResult(error=f"more than {MAX_ROWS} rows")
        return QueryResult(rows=rows, columns=tuple(str(column[0]) for column in cursor.description))
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError, UnicodeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        return QueryResult(error="took too long" if text == "interrupted" else text)
    finally:
        connection.close()


def _plain(value: Value) -> Value:
    """Make 3 and 3.0 equal, and floats equal up to rounding noise."""
    if isinstance(value, float):
        return round(value, 6)
    return value


def same_result(gold: QueryResult, predicted: QueryResult, *, ordered: bool) -> bool:
    """Whether two results hold the same rows; in the same order where the question asks for an order.

    Rows are compared as tuples, so columns must come in the same order; a failed query never equals anything.
    """
    if gold.rows is None or predicted.rows is None:
        return False
    left = [tuple(_plain(value) for value in row) for row in gold.rows]
    right = [tuple(_plain(value) for value in row) for row in predicted.rows]
    return left == right if ordered else Counter(left) == Counter(right)
