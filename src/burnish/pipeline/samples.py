"""Choosing a few questions whose answers are shown side by side."""

from __future__ import annotations

from collections.abc import Mapping

from burnish.measure.evaluate import Answer, SqlScore
from burnish.measure.run_record import Sample, SampleAnswer

NUM_SAMPLES = 3


def pick_samples(scores: Mapping[str, SqlScore], *, count: int = NUM_SAMPLES) -> list[Sample]:
    """Questions of different kinds that tell the variants apart, and one that the best variant gets wrong, if any.

    Args:
        scores: variant -> score over the same rows in the same order.
    """
    answers = {name: score.answers for name, score in scores.items()}
    best = max(scores, key=lambda name: scores[name].score)
    numbers = range(len(answers[best]))
    order = sorted(numbers, key=lambda number: (-len({row[number].right for row in answers.values()}), number))
    chosen: list[int] = []
    kinds: set[str | None] = set()
    for number in order:
        answer = answers[best][number]
        if len(chosen) < count - 1 and answer.right and answer.kind not in kinds:
            chosen.append(number)
            kinds.add(answer.kind)
    wrong = [number for number in order if not answers[best][number].right]
    chosen += wrong[:1] or [number for number in order if number not in chosen][:1]
    return [_sample(number, answers) for number in chosen]


def _sample(number: int, answers: Mapping[str, tuple[Answer, ...]]) -> Sample:
    first = next(iter(answers.values()))[number]
    shown = {
        name: SampleAnswer(text=rows[number].predicted, right=rows[number].right, error=rows[number].error)
        for name, rows in answers.items()
    }
    return Sample(question=first.question, gold=first.gold, context=first.context, answers=shown)
