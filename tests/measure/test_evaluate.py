"""Answers are judged by running them; every one is kept with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from measure_fakes import ScriptedEngine

from burnish.data.rows import read_rows
from burnish.errors import DataError
from burnish.measure.evaluate import bleu, evaluate_sql, evaluate_text

DATABASE = """
CREATE TABLE ship (name TEXT, built INTEGER);
INSERT INTO ship VALUES ('Aurora', 1985), ('Borealis', 1994), ('Castor', 2003);
"""


@dataclass
class Row:
    instruction: str
    answer: str
    context: str = "CREATE TABLE ship (name TEXT, built INTEGER);"
    extra: dict[str, Any] = field(default_factory=lambda: {"database": DATABASE, "ordered": False, "kind": "plain"})
    file: str = "ships.jsonl"
    number: int = 7


def ask(row: Row) -> str:
    return row.instruction


def judge(row: Row, answer: str) -> Any:
    return evaluate_sql(ScriptedEngine({row.instruction: answer}), [row], render=ask).answers[0]


def test_a_query_that_gives_the_same_rows_is_right_however_it_is_written() -> None:
    row = Row("after 1990?", "SELECT name FROM ship WHERE built > 1990")
    assert judge(row, "```sql\nselect name from ship where not built <= 1990 order by name desc;\n```").right
    wrong = judge(row, "SELECT name FROM ship WHERE built > 2000")
    assert (wrong.right, wrong.valid, wrong.error) == (False, True, None)


def test_order_counts_only_where_the_question_asks_for_it() -> None:
    gold = "SELECT name FROM ship ORDER BY built"
    other_way = "SELECT name FROM ship ORDER BY built DESC"
    assert judge(Row("which?", gold), other_way).right
    for flag in (True, "True", "1"):  # CSV has only text
        asked = Row("which, by age?", gold, extra={"database": DATABASE, "ordered": flag})
        assert not judge(asked, other_way).right
        assert judge(asked, gold).right
    assert judge(Row("which?", gold, extra={"database": DATABASE, "ordered": "false"}), other_way).right


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("SELECT nam FROM ship", "no such column: nam"),
        ("DROP TABLE ship", "not authorized"),
        ("", "no answer"),
        ("port port port", "syntax error"),
    ],
)
def test_an_answer_that_does_not_run_is_wrong_and_says_why(answer: str, words: str) -> None:
    found = judge(Row("which?", "SELECT name FROM ship"), answer)
    assert (found.right, found.valid) == (False, False)
    assert words in found.error


def test_score_interval_kinds_and_progress_add_up() -> None:
    rows = [
        Row("one", "SELECT 1", extra={"database": DATABASE, "kind": "a"}),
        Row("two", "SELECT 2", extra={"database": DATABASE, "kind": "a"}),
        Row("three", "SELECT 3", extra={"database": DATABASE, "kind": "b"}),
        Row("four", "SELECT 4", extra={"database": DATABASE, "kind": "b"}),
    ]
    engine = ScriptedEngine({"one": "SELECT 1", "two": "SELECT 2", "three": "SELECT 30", "four": "SELECT"})
    seen: list[tuple[int, int]] = []
    score = evaluate_sql(engine, rows, render=ask, max_tokens=9, on_progress=lambda *place: seen.append(place))
    assert (score.metric, score.num_rows, score.num_right, score.score) == ("execution accuracy", 4, 2, 0.5)
    assert (score.score_low, score.score_high) == pytest.approx((0.1500, 0.8500), abs=1e-3)
    assert (score.by_kind["a"].score, score.by_kind["b"].score, score.by_kind["b"].num_rows) == (1.0, 0.0, 2)
    assert (score.valid_share, score.exact_match) == (0.75, 0.5)
    assert score.output_tokens == sum(len(answer) for answer in engine.answers.values())
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [answer.predicted for answer in score.answers] == ["SELECT 1", "SELECT 2", "SELECT 30", "SELECT"]
    assert engine.params[0].greedy
    assert engine.params[0].max_tokens == 9
    assert "answers" not in score.to_dict(answers=False)


def test_rows_without_a_database_are_judged_by_their_text_and_checked_against_their_schema() -> None:
    row = Row("after 1990?", 'SELECT name FROM ship WHERE built > "1990"', extra={})
    same = judge(row, "select name from ship where built > '1990'")
    assert (same.right, same.valid) == (True, True)
    other = judge(row, "SELECT title FROM ship")
    assert (other.right, other.valid) == (False, False)
    score = evaluate_sql(ScriptedEngine({}), [row, Row("x", "SELECT 1")], render=ask)
    assert score.metric == "execution accuracy and exact match"


def test_a_prompt_longer_than_the_context_is_one_wrong_answer_not_the_end() -> None:
    rows = [Row("long", "SELECT 1"), Row("short", "SELECT 1")]
    engine = ScriptedEngine({"short": "SELECT 1"}, max_model_len=8)
    score = evaluate_sql(engine, rows, render=lambda row: [1] * 8 if row.instruction == "long" else "short")
    assert [answer.right for answer in score.answers] == [False, True]
    assert score.answers[0].error == "the prompt has 8 tokens, the context 8"
    assert engine.asked == ["short"]


def test_a_gold_query_that_does_not_run_names_its_row() -> None:
    with pytest.raises(DataError, match=r"file ships.jsonl, row 7.*no such table"):
        evaluate_sql(ScriptedEngine({}), [Row("x", "SELECT * FROM boat")], render=ask)


def test_the_bundled_task_is_scored_by_its_own_databases() -> None:
    rows = read_rows("text-to-sql:test:24").rows
    golds = {row.instruction: row.answer for row in rows}
    perfect = evaluate_sql(ScriptedEngine(golds), rows, render=ask)
    assert (perfect.metric, perfect.score) == ("execution accuracy", 1.0)
    assert sum(kind.num_rows for kind in perfect.by_kind.values()) == 24
    swapped = dict(zip(golds, [*list(golds.values())[1:], "SELECT 0"]))
    assert evaluate_sql(ScriptedEngine(swapped), rows, render=ask).score < 0.5


def test_no_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="no rows"):
        evaluate_sql(ScriptedEngine({}), [], render=ask)
    with pytest.raises(DataError, match="no rows"):
        evaluate_text(ScriptedEngine({}), [], render=ask)


def test_bleu_is_a_hundred_for_equal_texts_and_low_for_others() -> None:
    text = "the quick brown fox jumps over the lazy dog"
    score, signature = bleu([text], [text])
    assert score == pytest.approx(100)
    assert "nrefs:1" in signature
    assert bleu(["a completely different line of words"], [text])[0] < 10
    with pytest.raises(DataError, match="2 predictions and 1"):
        bleu(["a", "b"], ["a"])


def test_free_text_is_scored_by_bleu_and_equality() -> None:
    rows = [Row("a", "one two three four five", extra={}), Row("b", "six seven eight nine ten", extra={})]
    engine = ScriptedEngine({"a": "one two three  four five\n", "b": "six seven eight nine eleven"})
    score = evaluate_text(engine, rows, render=ask)
    assert (score.exact_match, score.num_rows) == (0.5, 2)
    assert 50 < score.bleu < 100
