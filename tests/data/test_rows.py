from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.data.rows import read_rows
from burnish.errors import DataError


def write_rows(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "layout", "fields"),
    [
        ({"instruction": "i", "input": "c", "output": "o"}, "alpaca", ("i", "c", "o")),
        ({"instruction": "i", "output": "o"}, "alpaca", ("i", "", "o")),
        ({"question": "q", "context": "c", "answer": "a"}, "sql", ("q", "c", "a")),
        ({"question": "q", "answer": "a"}, "question", ("q", "", "a")),
        ({"prompt": "p", "completion": "x"}, "prompt", ("p", "", "x")),
        ({"prompt": "p", "response": "x"}, "prompt", ("p", "", "x")),
        ({"instruction": "i", "answer": "a"}, "columns", ("i", "", "a")),
    ],
)
def test_known_layouts_are_recognised(
    tmp_path: Path, row: dict[str, str], layout: str, fields: tuple[str, str, str]
) -> None:
    found = read_rows(write_rows(tmp_path, [row | {"source": "x"}]))
    assert found.layout == layout
    first = found.rows[0]
    assert (first.instruction, first.context, first.answer) == fields
    assert (first.extra, first.number, first.file) == ({"source": "x"}, 1, found.source)


@pytest.mark.parametrize(
    ("column", "messages"),
    [
        (
            "messages",
            [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "1"},
                {"role": "user", "content": "two"},
                {"role": "assistant", "content": "2"},
            ],
        ),
        (
            "conversations",
            [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "one"},
                {"from": "gpt", "value": "1"},
                {"from": "human", "value": "two"},
                {"from": "gpt", "value": "2"},
            ],
        ),
    ],
)
def test_conversation_gives_a_row_per_answer_with_what_came_before(
    tmp_path: Path, column: str, messages: list[dict[str, str]]
) -> None:
    found = read_rows(write_rows(tmp_path, [{column: messages}]))
    assert found.layout == "chat"
    assert [(row.instruction, row.answer, row.number) for row in found.rows] == [("one", "1", 1), ("two", "2", 1)]
    assert found.rows[1].extra["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
    ]


def test_bad_rows_are_collected_with_number_and_reason(tmp_path: Path) -> None:
    good = {"question": "q", "context": "c", "answer": "a"}
    path = tmp_path / "rows.jsonl"
    bad: list[tuple[Any, str]] = [
        (good | {"answer": ""}, "answer is empty"),
        (good | {"answer": " \n"}, "answer is empty"),
        (good | {"answer": None}, "answer is null"),
        ({"question": "q", "context": "c"}, "answer is missing"),
        (good | {"question": 3}, "question is a number, not text"),
        (good | {"context": ["c"]}, "context is a list, not text"),
        (good | {"answer": True}, "answer is a boolean, not text"),
        (good | {"answer": "\ud800"}, "lone surrogates"),
        ("text", "the row is text, not an object"),
        ([1], "the row is a list, not an object"),
        (None, "the row is null, not an object"),
    ]
    lines = [json.dumps(good), *(json.dumps(value) for value, _ in bad), json.dumps(good)]
    path.write_text("\n".join(lines), encoding="utf-8")
    found = read_rows(path)
    assert [row.number for row in found.rows] == [1, len(lines)]
    assert [entry.number for entry in found.bad_rows] == list(range(2, len(lines)))
    for entry, reason in zip(found.bad_rows, [reason for _, reason in bad], strict=True):
        assert reason in entry.reason
        assert str(entry) == f"{path}, row {entry.number}: {entry.reason}"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "messages is text, not a list"),
        (["hello"], "message 1 of messages is text"),
        ([{"role": "wizard", "content": "x"}], "unknown role 'wizard'"),
        ([{"role": "user", "content": 1}], "a number as content"),
        ([{"role": "user", "content": "x"}], "no assistant message"),
        ([{"role": "assistant", "content": "x"}], "no assistant message that answers a user"),
        ([], "no assistant message"),
    ],
)
def test_bad_conversations_say_why(tmp_path: Path, messages: Any, reason: str) -> None:
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    found = read_rows(write_rows(tmp_path, [good, {"messages": messages}]))
    assert len(found) == 1
    assert reason in found.bad_rows[0].reason


def test_columns_may_be_mapped_by_hand(tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"text": "t", "schema": "s", "sql": "x", "id": 1}])
    row = read_rows(path, columns={"instruction": "text", "context": "schema", "answer": "sql"}).rows[0]
    assert (row.instruction, row.context, row.answer, row.extra) == ("t", "s", "x", {"id": 1})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (None, r"fit no known layout; got texte, sql, quesion; expected .*Did you mean question for quesion\?"),
        ({"instruction": "text", "answer": "sql"}, r"no column 'text' for the instruction; got .*Did you mean texte\?"),
        ({"instruction": "texte"}, "does not say which column holds the answer"),
        ({"instruktion": "texte", "answer": "sql"}, r"unknown field; got instruktion; .*Did you mean instruction\?"),
    ],
)
def test_unknown_columns_are_listed_with_a_hint(tmp_path: Path, columns: dict[str, str] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(write_rows(tmp_path, [{"texte": "t", "sql": "x", "quesion": "?"}]), columns=columns)


def test_nothing_usable_is_an_error_that_shows_the_first_reason(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        read_rows(empty)
    with pytest.raises(DataError, match=r"all 2 rows of .* row 1: answer is empty"):
        read_rows(write_rows(tmp_path, [{"question": "q", "answer": ""}] * 2))
    with pytest.raises(DataError, match="no usable row; got row 1: no row is an object"):
        read_rows(write_rows(tmp_path, [1, 2]))
    with pytest.raises(DataError, match="there is no file"):
        read_rows(tmp_path / "none.json")
    with pytest.raises(DataError, match="there is no file"):
        read_rows("none.json")


def test_limit_counts_usable_rows_and_stops_reading(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a" if number % 2 else ""} for number in range(100)]
    found = read_rows(write_rows(tmp_path, rows), limit=3)
    assert [row.number for row in found.rows] == [2, 4, 6]
    assert [row.number for row in found.bad_rows] == [1, 3, 5]
    with pytest.raises(DataError, match="limit"):
        read_rows(write_rows(tmp_path, rows), limit=0)


@pytest.mark.parametrize(
    ("context", "answer", "reason"),
    [
        ("CREATE TABLE t (a INTEGER)", "SELECT b FROM t", "no such column: b"),
        ("CREATE TABLE t (a INTEGER", "SELECT a FROM t", "the context is no database"),
        ("CREATE TABLE t (a INTEGER)", "DROP TABLE t", "does not run"),
        ("ATTACH DATABASE '{folder}/out.db' AS x; CREATE TABLE x.t (a)", "SELECT 1", "the context is no database"),
        ("VACUUM INTO '{folder}/out.db'", "SELECT 1", "the context is no database"),
        (
            "CREATE TABLE t AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
            "SELECT 1",
            "interrupted",
        ),
    ],
)
def test_check_sql_refuses_what_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: str, answer: str, reason: str
) -> None:
    monkeypatch.setattr("burnish.data.rows._SCHEMA_SECONDS", 0.1)
    good = {"question": "q", "context": "CREATE TABLE t (a INTEGER)", "answer": "SELECT a FROM t"}
    bad = good | {"context": context.format(folder=tmp_path), "answer": answer}
    path = write_rows(tmp_path, [good, bad])
    assert len(read_rows(path)) == 2
    found = read_rows(path, check_sql=True)
    assert len(found) == 1
    assert reason in found.bad_rows[0].reason
    assert not (tmp_path / "out.db").exists()


def test_check_sql_finds_the_known_share_of_bad_real_rows(shared_data: Path) -> None:
    found = read_rows(shared_data / "sql" / "spider_create_context_train.json", check_sql=True)
    assert len(found.rows) + len(found.bad_rows) == 3961
    assert 0.06 < len(found.bad_rows) / 3961 < 0.09


@pytest.mark.parametrize(
    ("name", "layout", "count"),
    [("sql/wikisql_dev_1k.jsonl", "sql", 1000), ("alpaca/alpaca_data_1k.json", "alpaca", 1000)],
)
def test_real_files_are_read_whole(shared_data: Path, name: str, layout: str, count: int) -> None:
    found = read_rows(shared_data / name)
    assert (found.layout, len(found.rows) + len(found.bad_rows), len(found.bad_rows)) == (layout, count, 0)


def test_bundled_task_gives_the_rows_asked_for() -> None:
    found = read_rows("text-to-sql:test:7")
    assert (len(found), found.layout, found.bad_rows) == (7, "sql", [])
    assert found.rows == read_rows("text-to-sql:test:7").rows
    assert found.rows != read_rows("text-to-sql:test:7", seed=1).rows
    assert {"database", "ordered", "kind"} <= set(found.rows[0].extra)
    assert len(read_rows("text-to-sql:validation:5", check_sql=True)) == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("text-to-sql:tests", r"no split 'tests'.*Did you mean text-to-sql:test\?"),
        ("text-to-sql", "no split ''"),
        ("text-to-sql:test:many", "number of rows in text-to-sql:test:many is wrong"),
        ("text-to-sql:test:0", "a whole number above 0"),
    ],
)
def test_bundled_task_names_its_splits(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(source)
