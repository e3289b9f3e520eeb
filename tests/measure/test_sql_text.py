"""The statement in an answer, and one spelling for queries that mean the same."""

from __future__ import annotations

import pytest

from burnish.measure.sql_text import normalise_sql, statement_in


@pytest.mark.parametrize(
    ("answer", "statement"),
    [
        ("SELECT 1", "SELECT 1"),
        ("  SELECT 1;\nDROP TABLE a", "SELECT 1"),
        ("```sql\nSELECT a\nFROM b;\n```\nThis lists a.", "SELECT a\nFROM b"),
        ("SELECT ';' FROM a; more", "SELECT ';' FROM a"),
        ("", ""),
    ],
)
def test_statement_is_the_first_one_out_of_its_fence(answer: str, statement: str) -> None:
    assert statement_in(answer) == statement


@pytest.mark.parametrize(
    "spelling",
    [
        'select  name from book where Writer != "Dennis Lee" ;',
        "SELECT name\nFROM book WHERE writer<>'Dennis Lee'",
        "SELECT `name` FROM book WHERE Writer <> 'Dennis Lee'",
    ],
)
def test_spellings_of_one_query_are_equal(spelling: str) -> None:
    assert normalise_sql(spelling) == "select name from book where writer <> 'Dennis Lee'"


def test_letters_inside_literals_and_different_operators_still_count() -> None:
    assert normalise_sql("SELECT 'A'") != normalise_sql("SELECT 'a'")
    assert normalise_sql("SELECT a > 1") != normalise_sql("SELECT a >= 1")
