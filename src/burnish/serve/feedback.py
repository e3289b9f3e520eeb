"""What people say of answers: an answer's id and whether it was right, or what would have been."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from burnish.serve.faults import Fault
from burnish.serve.jobs import Answer, Job

MOST_ANSWERS = 10_000
"""Answers that are remembered, the newest; of each the id, the model and a hash of the text."""
RECENT_LABELS = 1_000


@dataclass
class _Remembered:
    model: str
    digest: bytes
    correct: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Label:
    """What an answer was found to be; `counted` is False where that had been said before."""

    model: str
    correct: bool
    counted: bool


class Feedback:
    """Labels of answers, and the accuracy that follows from them; a collector for Prometheus."""

    def __init__(self) -> None:
        self._answers: OrderedDict[tuple[str, int], _Remembered] = OrderedDict()
        self._counts: dict[tuple[str, bool], int] = {}
        self._recent: dict[str, deque[bool]] = {}
        self._lock = threading.Lock()

    def on_answer(self, job: Job, answer: Answer, decode_s: float) -> None:
        """Remember an answer that has ended."""
        with self._lock:
            place = (job.answer_id, answer.index)
            self._answers[place] = _Remembered(job.model, _digest("".join(answer.texts)))
            if len(self._answers) > MOST_ANSWERS:
                self._answers.popitem(last=False)

    def label(self, answer_id: str, index: int, *, correct: bool | None, expected: str | None) -> Label:
        """Count an answer as right or wrong; with `expected` it is right if the texts are equal but for white space.

        Raises:
            Fault: there is no such answer (404), or it was said to be the opposite before (400).
        """
        with self._lock:
            answer = self._answers.get((answer_id, index))
            if answer is None:
                raise Fault(
                    404,
                    f"there is no answer of this id and index among the last {MOST_ANSWERS:,}",
                    param="id",
                    code="answer_not_found",
                )
            said = correct if correct is not None else _digest(expected or "") == answer.digest
            if answer.correct is not None:
                if answer.correct != said:
                    raise Fault(400, "this answer has been given the opposite label before", param="id")
                return Label(model=answer.model, correct=said, counted=False)
            answer.correct = said
            self._counts[answer.model, said] = self._counts.get((answer.model, said), 0) + 1
            self._recent.setdefault(answer.model, deque(maxlen=RECENT_LABELS)).append(said)
            return Label(model=answer.model, correct=said, counted=True)

    def collect(self) -> Iterator[Any]:
        """For Prometheus."""
        counts = CounterMetricFamily(
            "burnish_feedback", "Answers that people labelled, right or wrong.", labels=["model", "correct"]
        )
        accuracy = GaugeMetricFamily(
            "burnish_feedback_accuracy",
            f"Share right of the last {RECENT_LABELS:,} labelled answers.",
            labels=["model"],
        )
        with self._lock:
            for (model, correct), number in self._counts.items():
                counts.add_metric([model, "true" if correct else "false"], number)
            for model, labels in self._recent.items():
                accuracy.add_metric([model], sum(labels) / len(labels))
        yield counts
        yield accuracy


def _digest(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()
