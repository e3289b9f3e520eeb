"""Rows to learn from or to be tested on, from any source burnish knows, and the rows that are unusable.

A source is a file (.json, .jsonl, .csv, .tsv, .parquet), a data set on the hub (org/name[@revision][:split]), or the
bundled task: text-to-sql:train, :validation or :test, with an optional count (text-to-sql:test:300).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

from burnish.data.layouts import BadValueError, Layout, choose_layout, read_fields
from burnish.data.readers import Record, file_records, hub_records, looks_like_hub_name
from burnish.errors import DataError

TASK = "text-to-sql"
TASK_SPLITS = {"train": 4000, "validation": 200, "test": 300}
_ROWS_TO_SEE_COLUMNS = 50
_SCHEMA_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One question with its answer.

    Attributes:
        instruction: what is asked.
        context: what it is asked about (a schema, a passage); "" for none.
        answer: what is to be learned.
        extra: the row's other columns; "messages" holds the conversation before the answer, where there is one.
        file, number: where the row was read.
    """

    instruction: str
    context: str
    answer: str
    extra: dict[str, Any] = field(default_factory=dict)
    file: str = ""
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be used, and why."""

    file: str
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class RowSet:
    """What a source gave.

    Attributes:
        layout: the name of the layout that the columns fit ("sql", "alpaca", "chat", "prompt", "question", "text",
            "columns").
        columns: the columns found, in order.
    """

    rows: list[Row]
    bad_rows: list[BadRow]
    source: str
    layout: str
    columns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class RowStream:
    """A source that is being read: rows and bad rows one at a time, in order, to be gone through once.

    Attributes:
        items: the rows of one record each (a conversation gives several), or why it gave none.
        layout, columns: as in `RowSet`.
    """

    items: Iterator[list[Row] | BadRow]
    source: str
    layout: str
    columns: tuple[str, ...]


def read_rows(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    check_sql: bool = False,
    seed: int = 0,
    offline: bool = False,
    texts: bool = False,
) -> RowSet:
    """Read the rows of a source; unusable ones are collected, never raised.

    Args:
        source: a path, a hub name, or text-to-sql:SPLIT[:COUNT].
        columns: field -> column, for layouts that are not recognised; fields are instruction, answer and context.
        limit: stop after this many usable rows.
        check_sql: also refuse rows whose answer does not run on the database that their context describes.
        seed: of the bundled task's generator.
        offline: never reach for the network.
        texts: also take rows with nothing but a text; it becomes the answer to an empty instruction.

    Raises:
        DataError: the source is missing, broken, empty or has no usable row, or its columns are unknown.
        MissingExtraError: Parquet or hub data, and the data extra is not installed.
    """
    if limit is not None and limit < 1:
        raise DataError("the limit of rows is too small", got=limit, expected="at least 1")
    stream = stream_rows(source, columns=columns, check_sql=check_sql, seed=seed, offline=offline, texts=texts)
    rows: list[Row] = []
    bad: list[BadRow] = []
    while limit is None or len(rows) < limit:
        item = next(stream.items, None)
        if item is None:
            break
        if isinstance(item, BadRow):
            bad.append(item)
        else:
            rows.extend(item)
    if not rows:
        raise no_usable_row(stream.source, len(bad), bad[0])
    return RowSet(rows=rows[:limit], bad_rows=bad, source=stream.source, layout=stream.layout, columns=stream.columns)


def stream_rows(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    check_sql: bool = False,
    seed: int = 0,
    offline: bool = False,
    texts: bool = False,
) -> RowStream:
    """`read_rows` without a list: opens the source, chooses the layout, and leaves the reading to the caller.

    Raises:
        DataError: the source is missing, broken or empty, or its columns are unknown.
        MissingExtraError: Parquet or hub data, and the data extra is not installed.
    """
    name = str(source)
    records = _records(source, offline=offline, seed=seed)
    first = list(islice(records, _ROWS_TO_SEE_COLUMNS))
    seen = [record for record in first if isinstance(record.value, Mapping)]
    found = tuple(dict.fromkeys(str(column) for record in seen for column in record.value))
    if not first:
        raise DataError(f"{name} is empty", expected="at least one row")
    if not seen:
        raise DataError(
            f"{name} has no usable row", got=f"row {first[0].number}: no row is an object with named columns"
        )
    layout = choose_layout(found, columns=columns, source=name, texts=texts)

    def rows_or_reason(record: Record) -> list[Row] | BadRow:
        try:
            return _rows_of(record, layout, file=name, check_sql=check_sql)
        except BadValueError as error:
            return BadRow(file=name, number=record.number, reason=str(error))

    items = map(rows_or_reason, chain(first, records))
    return RowStream(items=items, source=name, layout=layout.name, columns=found)


def no_usable_row(name: str, num_bad: int, first: BadRow) -> DataError:
    """The error of a source with nothing but bad rows."""
    return DataError(f"all {num_bad} rows of {name} are unusable", got=f"row {first.number}: {first.reason}, and so on")


def _records(source: str | Path, *, offline: bool, seed: int) -> Iterator[Record]:
    if isinstance(source, str):
        if source.partition(":")[0] == TASK and not Path(source).exists():
            return _task_records(source, seed=seed)
        if not Path(source).exists() and looks_like_hub_name(source):
            return hub_records(source, offline=offline)
    return file_records(Path(source))


def _task_records(source: str, *, seed: int) -> Iterator[Record]:
    _, _, rest = source.partition(":")
    split, _, amount = rest.partition(":")
    if split not in TASK_SPLITS:
        close = get_close_matches(split, TASK_SPLITS, n=1)
        raise DataError(
            f"the bundled task has no split {split!r}",
            expected=", ".join(f"{TASK}:{name}" for name in TASK_SPLITS),
            remedy=f"Did you mean {TASK}:{close[0]}?" if close else None,
        )
    if amount and not (amount.isascii() and amount.isdigit() and int(amount) > 0):
        raise DataError(f"the number of rows in {source} is wrong", got=repr(amount), expected="a whole number above 0")
    from burnish.data.text_to_sql.generate import generate  # only this source needs the generator

    values = generate(split, int(amount) if amount else TASK_SPLITS[split], seed=seed)
    return (Record(number=number, value=value) for number, value in enumerate(values, 1))


def _rows_of(record: Record, layout: Layout, *, file: str, check_sql: bool) -> list[Row]:
    rows = []
    for fields in read_fields(record.value, layout):
        extra = {column: value for column, value in record.value.items() if column not in layout.columns}
        if fields.history:
            extra["messages"] = list(fields.history)
        rows.append(
            Row(
                instruction=fields.instruction,
                context=fields.context,
                answer=fields.answer,
                extra=extra,
                file=file,
                number=record.number,
            )
        )
        if check_sql:
            _check_sql(rows[-1])
    return rows


def _check_sql(row: Row) -> None:
    """Run the answer on the row's database, or on its context where it has none.

    Raises:
        BadValueError: the schema cannot be built, or the answer does not run on it.
    """
    from burnish.data.text_to_sql.execute import run_query  # rows of other tasks need no SQLite

    schema = row.extra.get("database")
    schema = schema if isinstance(schema, str) else row.context
    problem = _build_problem(schema)
    if problem:
        raise BadValueError(f"the context is no database: {problem}")
    error = run_query(schema, row.answer).error
    if error:
        raise BadValueError(f"the answer does not run on its context: {error}")


def _build_problem(script: str) -> str | None:
    """Why a script from a data file must not or cannot build a database; it may neither open nor write files."""
    refused = {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA}
    connection = sqlite3.connect(":memory:")
    try:
        connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action in refused else sqlite3.SQLITE_OK)
        deadline = time.monotonic() + _SCHEMA_SECONDS
        connection.set_progress_handler(lambda: int(time.monotonic() > deadline), 1_000)
        connection.executescript(script)
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
        return " ".join(str(error).split())
    finally:
        connection.close()
    return None
