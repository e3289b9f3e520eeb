"""Two models' answers to the same questions: what was lost, what was gained, and whether it can be chance."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.errors import DataError
from burnish.measure.evaluate import Answer, SqlScore
from burnish.measure.formatting import format_share
from burnish.measure.intervals import mcnemar_p, paired_interval
from burnish.measure.json_values import to_plain

CHANCE = 0.05
"""A drop counts when chance alone would give it less often than this (one-sided)."""
CHANCE_OF_A_KIND = 0.01
"""The same for one kind of question, of which there are many."""
NEGATION = "negation"
_NEGATION = re.compile(r"<>|!=|\bNOT\b(?!\s+NULL)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class KindChange:
    """One kind of question; `lost` only the parent answered right, `gained` only the child."""

    num_rows: int
    parent_right: int
    child_right: int
    lost: int
    gained: int
    p_value: float


@dataclass(frozen=True, kw_only=True)
class ChangedAnswer:
    """A question that one of the two answered right and the other wrong."""

    question: str
    context: str
    gold: str
    parent: str
    child: str
    lost: bool
    """The parent was right; else the child is."""
    kind: str | None = None
    error: str | None = None
    """Why the wrong query did not run, if it did not."""


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """A child beside its parent on a task; scores are shares in 0..1 with Wilson's 95 % intervals.

    Attributes:
        drop, drop_low, drop_high: parent's score less child's, with its 95 % interval over pairs.
        p_value: how probable such a drop is by chance (exact McNemar test, one-sided).
        reworded: answers that differ in their text and are both right or both wrong.
        by_kind: by the rows' kind; "negation" are the rows, of whatever kind, whose expected query excludes something.
        changed: every answer that was lost or gained, lost ones first.
    """

    metric: str
    num_rows: int
    parent_score: float
    parent_low: float
    parent_high: float
    score: float
    score_low: float
    score_high: float
    lost: int
    gained: int
    reworded: int
    drop: float
    drop_low: float
    drop_high: float
    p_value: float
    by_kind: dict[str, KindChange]
    changed: list[ChangedAnswer]

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)

    def losses(self, max_drop: float) -> list[str]:
        """A sentence for each drop of more than `max_drop` that is not chance: the whole score, then single kinds."""
        found = []
        if self.drop > max_drop and self.p_value <= CHANCE:
            found.append(
                f"{self.metric} is {format_share(self.score)}, {100 * self.drop:.1f} points below the parent's "
                f"(more than {100 * max_drop:g}; {self.lost} answers lost, {self.gained} gained of "
                f"{self.num_rows}, p = {self.p_value:.2g})"
            )
        kinds = [
            (name, kind)
            for name, kind in self.by_kind.items()
            if (kind.lost - kind.gained) / kind.num_rows > max_drop and kind.p_value <= CHANCE_OF_A_KIND
        ]
        for name, kind in sorted(kinds, key=lambda item: item[1].p_value)[:3]:
            found.append(
                f"{name}: {kind.child_right} of {kind.num_rows} right, the parent {kind.parent_right} "
                f"(p = {kind.p_value:.2g})"
            )
        return found


def compare_answers(parent: SqlScore, child: SqlScore) -> TaskComparison:
    """Pair the answers of two models.

    Raises:
        DataError: they were not asked the same questions.
    """
    asked = [[answer.question for answer in score.answers] for score in (parent, child)]
    if asked[0] != asked[1]:
        raise DataError("parent and child were asked different questions", got=f"{len(asked[0])} and {len(asked[1])}")
    pairs = list(zip(parent.answers, child.answers))
    whole = _change(pairs)
    low, high = paired_interval(whole.lost, whole.gained, whole.num_rows)
    groups: dict[str, list[tuple[Answer, Answer]]] = {}
    for pair in pairs:
        if pair[0].kind is not None:
            groups.setdefault(pair[0].kind, []).append(pair)
        if excludes(pair[0].gold):
            groups.setdefault(NEGATION, []).append(pair)
    changed = [_changed(*pair) for pair in pairs if pair[0].right != pair[1].right]
    return TaskComparison(
        metric=child.metric,
        num_rows=whole.num_rows,
        parent_score=parent.score,
        parent_low=parent.score_low,
        parent_high=parent.score_high,
        score=child.score,
        score_low=child.score_low,
        score_high=child.score_high,
        lost=whole.lost,
        gained=whole.gained,
        reworded=_count(pairs, lambda before, after: before.right == after.right and not _same_text(before, after)),
        drop=parent.score - child.score,
        drop_low=low,
        drop_high=high,
        p_value=whole.p_value,
        by_kind={name: _change(groups[name]) for name in sorted(groups)},
        changed=sorted(changed, key=lambda answer: not answer.lost),
    )


def excludes(sql: str) -> bool:
    """Whether a query leaves rows out by a negation: <>, != or NOT."""
    return _NEGATION.search(re.sub(r"'[^']*'", "''", sql)) is not None


def _change(pairs: Sequence[tuple[Answer, Answer]]) -> KindChange:
    lost = _count(pairs, lambda before, after: before.right and not after.right)
    gained = _count(pairs, lambda before, after: after.right and not before.right)
    return KindChange(
        num_rows=len(pairs),
        parent_right=_count(pairs, lambda before, after: before.right),
        child_right=_count(pairs, lambda before, after: after.right),
        lost=lost,
        gained=gained,
        p_value=mcnemar_p(lost, gained),
    )


def _count(pairs: Sequence[tuple[Answer, Answer]], wanted: Callable[[Answer, Answer], bool]) -> int:
    return sum(wanted(before, after) for before, after in pairs)


def _same_text(before: Answer, after: Answer) -> bool:
    return before.predicted.split() == after.predicted.split()


def _changed(before: Answer, after: Answer) -> ChangedAnswer:
    return ChangedAnswer(
        question=before.question,
        context=before.context,
        gold=before.gold,
        parent=before.predicted,
        child=after.predicted,
        lost=before.right,
        kind=before.kind,
        error=after.error if before.right else before.error,
    )
