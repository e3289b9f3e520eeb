"""Sample databases and questions about them: held-out examples of the bundled text-to-SQL task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from burnish.data.text_to_sql import generate

NUM_SAMPLES = 200
# Questions of different kinds, to begin with.
SHOWN = (56, 73, 99, 109, 113, 98)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question with the database that it is about.

    Attributes:
        number: its place in the list; links name it so.
        context: the schema, which is what a model reads.
        database: script that makes the tables and their rows.
        answer: SQL that answers the question.
        ordered: the question asks for an order of rows.
    """

    number: int
    question: str
    context: str
    database: str
    answer: str
    ordered: bool


@lru_cache(maxsize=1)
def samples() -> tuple[Sample, ...]:
    """The first examples of the split that no bundled model was trained on."""
    found = []
    for number, example in enumerate(generate("test", NUM_SAMPLES, seed=0)):
        fields = {name: str(example[name]) for name in ("question", "context", "database", "answer")}
        found.append(Sample(number=number, ordered=bool(example["ordered"]), **fields))
    return tuple(found)


def sample_of(number: int | None) -> Sample | None:
    """The sample of this number; None where there is none."""
    return samples()[number] if number is not None and 0 <= number < NUM_SAMPLES else None
