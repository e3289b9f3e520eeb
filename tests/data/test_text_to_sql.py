"""The bundled task: splits that share nothing, examples whose answers run, scoring that tells right from wrong."""

from __future__ import annotations

import sqlite3
from collections import Counter

import pytest

from burnish.data.text_to_sql import SPLITS, generate, run_query, same_result
from burnish.data.text_to_sql.domains import SHARED_COLUMNS
from burnish.data.text_to_sql.execute import QueryResult
from burnish.data.text_to_sql.schema import parse_worlds, pluralize
from burnish.errors import DataError

TABLE = "CREATE TABLE t (a INTEGER, b TEXT); INSERT INTO t VALUES (1, 'x'); INSERT INTO t VALUES (2, 'y');"


def names_of(split: str) -> tuple[set[str], set[str]]:
    worlds = parse_worlds(SPLITS[split][0])
    tables = {kind.name for world in worlds for kind in world}
    columns = {column.name for world in worlds for kind in world for column in kind.columns}
    return tables, columns


def words_of(split: str) -> set[str]:
    lists = SPLITS[split][1]
    return {word for text in lists.values() for word in (text.split("|") if "|" in text else text.split())}


@pytest.mark.parametrize(("one", "other"), [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_splits_share_no_table_no_value_and_only_plain_columns(one: str, other: str) -> None:
    tables, columns = names_of(one)
    other_tables, other_columns = names_of(other)
    assert not tables & other_tables
    assert columns & other_columns <= SHARED_COLUMNS
    assert not words_of(one) & words_of(other)


@pytest.mark.parametrize("split", SPLITS)
def test_examples_run_and_answer_their_question(split: str) -> None:
    for example in generate(split, 120, seed=3):
        result = run_query(str(example["database"]), str(example["answer"]))
        assert result.rows, example
        assert str(example["database"]).startswith(str(example["context"]).splitlines()[0])


def test_examples_cover_every_kind_of_query() -> None:
    kinds = Counter(example["kind"] for example in generate("test", 400))
    wanted = "select where where_two count count_distinct distinct aggregate order top group having nested join".split()
    assert sorted(kinds) == sorted(wanted)
    sql = " ".join(str(example["answer"]) for example in generate("train", 600))
    for word in (
        "<>",
        "BETWEEN",
        " IN (",
        "LIKE",
        "DISTINCT",
        "GROUP BY",
        "HAVING",
        "JOIN",
        "LIMIT",
        "NOT IN",
        "(SELECT",
    ):
        assert word in sql


def test_order_is_asked_for_exactly_where_sql_orders_more_than_one_row() -> None:
    for example in generate("validation", 200):
        many = "ORDER BY" in str(example["answer"]) and not str(example["answer"]).endswith("LIMIT 1")
        assert example["ordered"] == many


def test_same_seed_gives_the_same_and_a_longer_list_begins_with_a_shorter() -> None:
    assert generate("train", 30, seed=5) == generate("train", 60, seed=5)[:30]
    assert generate("train", 30, seed=5) != generate("train", 30, seed=6)


def test_a_filter_always_changes_the_result() -> None:
    for example in generate("test", 150, seed=1):
        sql, database = str(example["answer"]), str(example["database"])
        if example["kind"] in ("where", "where_two"):
            loose = sql.split(" WHERE ")[0]
            assert not same_result(run_query(database, sql), run_query(database, loose), ordered=False)


def test_unknown_split_and_count_are_refused() -> None:
    with pytest.raises(DataError, match="unknown split"):
        generate("dev", 3)
    with pytest.raises(DataError, match="too small"):
        generate("train", 0)


@pytest.mark.parametrize(
    ("sql", "why"),
    [
        ("DROP TABLE t", "not authorized"),
        ("INSERT INTO t VALUES (3, 'z')", "not authorized"),
        ("ATTACH 'other.db' AS o", "not authorized"),
        ("PRAGMA table_info(t)", "not authorized"),
        ("SELECT load_extension('x')", ""),
        ("SELECT a FROM t; DROP TABLE t", "one statement"),
        ("SELECT missing FROM t", "no such column"),
        ("not sql at all", "syntax error"),
        ("", ""),
    ],
)
def test_query_that_is_not_a_plain_select_gives_an_error(sql: str, why: str) -> None:
    result = run_query(TABLE, sql)
    assert result.rows is None
    assert why in (result.error or "")


def test_query_without_end_is_stopped() -> None:
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT COUNT(*) FROM c"
    assert run_query(TABLE, endless, timeout_s=0.1).error == "took too long"


@pytest.mark.parametrize("script", ["ATTACH '{}' AS o; CREATE TABLE o.t (a)", "VACUUM INTO '{}'"])
def test_database_script_cannot_touch_files(script: str, tmp_path) -> None:
    file = tmp_path / "other.db"
    assert run_query(script.format(file), "SELECT 1").rows is None
    assert not file.exists()


def test_rows_compare_as_multisets_unless_order_is_asked_for() -> None:
    one, two = QueryResult(rows=[(1, "a"), (2, "b"), (2, "b")]), QueryResult(rows=[(2, "b"), (1, "a"), (2, "b")])
    assert same_result(one, two, ordered=False)
    assert not same_result(one, two, ordered=True)
    assert not same_result(one, QueryResult(rows=[(1, "a"), (2, "b")]), ordered=False)
    assert same_result(QueryResult(rows=[(3,)]), QueryResult(rows=[(3.0,)]), ordered=True)
    assert not same_result(QueryResult(rows=[("3",)]), QueryResult(rows=[(3,)]), ordered=True)
    assert not same_result(one, QueryResult(error="no"), ordered=False)


def test_database_script_is_what_sqlite_builds() -> None:
    example = generate("test", 1)[0]
    connection = sqlite3.connect(":memory:")
    connection.executescript(str(example["database"]))
    gold = connection.execute(str(example["answer"])).fetchall()
    connection.close()
    assert run_query(str(example["database"]), str(example["answer"])).rows == gold


@pytest.mark.parametrize(
    ("noun", "many"), [("book", "books"), ("city", "cities"), ("dish", "dishes"), ("play", "plays")]
)
def test_plurals(noun: str, many: str) -> None:
    assert pluralize(noun) == many
