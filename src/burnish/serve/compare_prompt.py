"""What is asked of all models at once, and how a link carries it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import urlencode

from burnish.data.rows import Row
from burnish.engine.sampling import SamplingParams
from burnish.errors import RequestError
from burnish.serve.compare_samples import NUM_SAMPLES, Sample, sample_of

MAX_QUESTION_CHARS = 20_000
MAX_CONTEXT_CHARS = 60_000
MAX_ANSWER_TOKENS = 4096
# Browsers and proxies cut longer addresses off.
MAX_LINK_CHARS = 8_000
_MAX_STRANGE = 4

# What each setting is called in a link.
_KEYS = {
    "question": "q",
    "context": "tables",
    "sample": "example",
    "max_tokens": "tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "in_turn": "in_turn",
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One prompt with its settings.

    Attributes:
        context: put before the question, such as a schema.
        sample: number of the example that question and context began as.
        in_turn: one model after another, so that none slows another down.

    Raises:
        RequestError: a value is out of its range.
    """

    question: str = ""
    context: str = ""
    sample: int | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    in_turn: bool = False

    def __post_init__(self) -> None:
        for name, most in (("question", MAX_QUESTION_CHARS), ("context", MAX_CONTEXT_CHARS)):
            text = getattr(self, name)
            if not isinstance(text, str) or len(text) > most:
                got = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
                raise RequestError(f"the {name} is not usable", got=got, expected=f"text of at most {most} characters")
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise RequestError(f"the {name} is no valid Unicode")
        if self.sample is not None:
            self._check_number("sample", 0, NUM_SAMPLES - 1)
        self._check_number("max_tokens", 1, MAX_ANSWER_TOKENS)
        self._check_number("seed", 0, 2**31 - 1)
        self._check_number("temperature", 0, 2, whole=False)
        self._check_number("top_p", 0.01, 1, whole=False)
        if not isinstance(self.in_turn, bool):
            raise RequestError("in_turn is not usable", got=self.in_turn, expected="true or false")

    def _check_number(self, name: str, least: float, most: float, *, whole: bool = True) -> None:
        value = getattr(self, name)
        kind = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
            expected = f"{'a whole number' if whole else 'a number'} from {least:g} to {most:.10g}"
            raise RequestError(f"{_KEYS[name]} is out of range", got=value, expected=expected)

    @property
    def of_sample(self) -> Sample | None:
        """The example whose tables the context still are."""
        sample = sample_of(self.sample)
        return sample if sample is not None and sample.context.strip() == self.context.strip() else None

    @property
    def database(self) -> str | None:
        """Script of the database to run SQL on: the example's with its rows, else the context's tables, empty."""
        sample = self.of_sample
        if sample is not None:
            return sample.database
        return self.context if "create table" in self.context.lower() else None

    @property
    def reference(self) -> Sample | None:
        """The example that this is, unchanged: its answer is known."""
        sample = self.of_sample
        return sample if sample is not None and sample.question.strip() == self.question.strip() else None

    def row(self) -> Row:
        """As templates read it."""
        return Row(instruction=self.question.strip(), context=self.context.strip(), answer="")

    def params(self) -> SamplingParams:
        """For the engine."""
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed
        )


def asked_of(sample: Sample) -> Asked:
    """An example as it is offered."""
    return Asked(question=sample.question, context=sample.context, sample=sample.number)


def to_query(asked: Asked) -> str:
    """A link's query, which holds what differs from the defaults; the tables of an example are named, not written.

    Raises:
        RequestError: it is too long for a link.
    """
    plain, sample = Asked(), asked.of_sample
    shown = replace(asked, sample=None if sample is None else sample.number)
    if sample is not None:
        question = asked.question if asked.reference is not None else sample.question
        plain = replace(plain, question=question, context=asked.context)
    pairs = [
        (_KEYS[each.name], _written(getattr(shown, each.name)))
        for each in fields(Asked)
        if getattr(shown, each.name) != getattr(plain, each.name)
    ]
    query = urlencode(pairs)
    if len(query) > MAX_LINK_CHARS:
        raise RequestError(
            "the prompt is too long for a link", got=f"{len(query)} characters", expected=f"at most {MAX_LINK_CHARS}"
        )
    return query


def from_query(query: Mapping[str, str]) -> tuple[Asked, list[str]]:
    """What a link asks for, and one line for each part of it that is not usable.

    Keys that begin with utm_ or __ are other programs', and passed over.
    """
    asked, complaints = Asked(), list[str]()
    names = {key: name for name, key in _KEYS.items()}
    strange = [key for key in query if key not in names and not key.startswith(("utm_", "__"))]
    complaints += [f"The link's {key[:40]!r} is no setting of this page" for key in strange[:_MAX_STRANGE]]
    # The example first: what a link says beside it changes it.
    for key in sorted(query.keys() & names.keys(), key=lambda key: key != _KEYS["sample"]):
        name = names[key]
        try:
            value = _read(name, query[key])
            asked = replace(asked, **{name: value})
            sample = sample_of(asked.sample)
            if name == "sample" and sample is not None:
                asked = asked_of(sample)
        except RequestError as error:
            complaints.append(f"The link's {error.message}")
    return asked, complaints


def _written(value: Any) -> str:
    return ("1" if value else "0") if isinstance(value, bool) else str(value)


def _read(name: str, text: str) -> Any:
    kinds: dict[str, Any] = {"sample": int, "max_tokens": int, "seed": int, "temperature": float, "top_p": float}
    if name == "in_turn":
        if text not in ("0", "1"):
            raise RequestError(f"{_KEYS[name]} is out of range", got=repr(text[:40]), expected="0 or 1")
        return text == "1"
    if name not in kinds:
        return text
    try:
        value = kinds[name](text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RequestError(f"{_KEYS[name]} is no number", got=repr(text[:40]))
    return value
