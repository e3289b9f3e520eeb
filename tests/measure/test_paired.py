"""Paired answers: what was lost and gained, whether it is chance, and what the gate makes of it."""

from __future__ import annotations

import pytest

from burnish.errors import DataError
from burnish.measure.compare import Gate, GateLimits
from burnish.measure.evaluate import Answer, KindScore, SqlScore
from burnish.measure.intervals import mcnemar_p, paired_interval, wilson_interval
from burnish.measure.paired import TaskComparison, compare_answers, excludes


def scored(rights: str, *, golds: list[str] | None = None, kinds: str | None = None, said: str = "") -> SqlScore:
    """A score of answers that are right where `rights` has a 1."""
    answers = tuple(
        Answer(
            question=f"question {number}",
            context="CREATE TABLE t (a TEXT)",
            gold=golds[number] if golds else "SELECT a FROM t",
            predicted="SELECT a FROM t" if right == "1" else f"SELECT b FROM t{said}",
            right=right == "1",
            valid=True,
            kind=kinds[number] if kinds else None,
        )
        for number, right in enumerate(rights)
    )
    num_right = rights.count("1")
    low, high = wilson_interval(num_right, len(rights))
    return SqlScore(
        metric="execution accuracy",
        score=num_right / len(rights),
        score_low=low,
        score_high=high,
        num_rows=len(rights),
        num_right=num_right,
        exact_match=0.0,
        valid_share=1.0,
        by_kind=dict[str, KindScore](),
        answers=answers,
        output_tokens=0,
        seconds=0.0,
    )


def judged(task: TaskComparison, limit: float) -> tuple[str, ...]:
    return Gate(GateLimits(max_score_drop=limit)).judge(task=task).reasons


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (5, 0, 1 / 32), (0, 5, 1.0), (8, 2, 56 / 1024), (1, 1, 0.75)],
)
def test_mcnemar_counts_the_tail_of_a_fair_coin(lost: int, gained: int, p: float) -> None:
    assert mcnemar_p(lost, gained) == pytest.approx(p)


def test_paired_interval_equals_its_formula_and_stays_within_one() -> None:
    # Bonett and Price, 2012: (5 + 1) / 102 and (1 + 1) / 102, and their difference
    assert paired_interval(5, 1, 100) == pytest.approx((-0.0146, 0.0930), abs=5e-4)
    assert paired_interval(0, 0, 50)[0] == -paired_interval(0, 0, 50)[1]
    assert paired_interval(1, 0, 1)[1] <= 1
    with pytest.raises(ValueError, match="3 lost"):
        paired_interval(3, 0, 2)


def test_answers_are_paired_and_the_lost_ones_come_first() -> None:
    task = compare_answers(scored("0111100000"), scored("1110000000", said=" WHERE 1"))
    assert (task.lost, task.gained, task.num_rows) == (2, 1, 10)
    assert task.drop == pytest.approx(0.1)
    assert task.drop_low < task.drop < task.drop_high
    assert [answer.lost for answer in task.changed] == [True, True, False]
    assert task.changed[0].parent == "SELECT a FROM t"
    assert task.changed[0].child == "SELECT b FROM t WHERE 1"
    assert task.reworded == 5


def test_a_drop_that_may_be_chance_passes_and_one_that_cannot_fails() -> None:
    assert judged(compare_answers(scored("1" * 100), scored("0" * 3 + "1" * 97)), 0.01) == ()
    reasons = judged(compare_answers(scored("1" * 100), scored("0" * 9 + "1" * 91)), 0.01)
    assert reasons == (
        "execution accuracy is 91.0 %, 9.0 points below the parent's "
        "(more than 1; 9 answers lost, 0 gained of 100, p = 0.002)",
    )
    assert judged(compare_answers(scored("1" * 100), scored("0" * 9 + "1" * 91)), 0.10) == ()


def test_a_lost_negation_fails_though_the_whole_score_hardly_moves() -> None:
    golds = ["SELECT a FROM t WHERE a <> 'x'"] * 8 + ["SELECT a FROM t"] * 392
    task = compare_answers(scored("1" * 400, golds=golds), scored("0" * 8 + "1" * 392, golds=golds))
    assert task.drop == pytest.approx(0.02)
    assert judged(task, 0.03) == ("negation: 0 of 8 right, the parent 8 (p = 0.0039)",)


def test_kinds_are_told_apart() -> None:
    task = compare_answers(scored("1111", kinds="aabb"), scored("0011", kinds="aabb"))
    assert {name: (kind.lost, kind.num_rows) for name, kind in task.by_kind.items()} == {"a": (2, 2), "b": (0, 2)}


def test_different_questions_are_refused() -> None:
    with pytest.raises(DataError, match="different questions"):
        compare_answers(scored("11"), scored("111"))


@pytest.mark.parametrize(
    ("sql", "negated"),
    [
        ("SELECT a FROM t WHERE a <> 'x'", True),
        ("SELECT a FROM t WHERE a != 'x'", True),
        ("SELECT a FROM t WHERE a NOT IN (SELECT b FROM u)", True),
        ("SELECT a FROM t WHERE a = 'Not Dennis Lee'", False),
        ("SELECT a FROM t WHERE a IS NOT NULL", False),
    ],
)
def test_what_excludes_rows(sql: str, negated: bool) -> None:
    assert excludes(sql) == negated
