"""Quality on a task: execution accuracy of generated SQL, exact match where nothing can be run, BLEU, perplexity.

Answers come from an engine, so any engine can be judged; what was asked and answered is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from burnish.data.text_to_sql.execute import QueryResult, run_query, same_result
from burnish.engine.outputs import EngineStats, RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.errors import DataError
from burnish.measure.intervals import wilson_interval
from burnish.measure.perplexity import Perplexity, perplexity
from burnish.measure.sql_text import normalise_sql, statement_in

__all__ = [
    "Answer",
    "GeneratingEngine",
    "KindScore",
    "Perplexity",
    "SqlScore",
    "TextScore",
    "bleu",
    "evaluate_sql",
    "evaluate_text",
    "perplexity",
    "wilson_interval",
]

EXECUTION = "execution accuracy"
EXACT = "exact match"


class TaskRow(Protocol):
    """The part of `data.rows.Row` that is judged. `extra` may hold `database`, `ordered` and `kind`."""

    @property
    def instruction(self) -> str: ...
    @property
    def context(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def extra(self) -> Mapping[str, Any]: ...


class GeneratingEngine(Protocol):
    """The part of the engine protocol that evaluation needs."""

    def generate(self, prompts: Sequence[Any], params: Any) -> Iterator[RequestOutput]: ...

    def stats(self) -> EngineStats: ...


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question, what was expected and what came back."""

    question: str
    context: str
    gold: str
    predicted: str
    right: bool
    valid: bool
    """The query ran (on the row's database, or on the empty tables of its context)."""
    error: str | None = None
    kind: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class KindScore:
    """Accuracy on one kind of question, with its 95 % interval."""

    num_rows: int
    num_right: int
    score: float
    score_low: float
    score_high: float


@dataclass(frozen=True, kw_only=True)
class SqlScore:
    """Accuracy in 0..1 with Wilson's 95 % interval, by kind of question, and every answer."""

    metric: str
    """`execution accuracy`, `exact match`, or both joined where only some rows bring a database."""
    score: float
    score_low: float
    score_high: float
    num_rows: int
    num_right: int
    exact_match: float
    valid_share: float
    by_kind: dict[str, KindScore]
    answers: tuple[Answer, ...]
    output_tokens: int
    seconds: float

    def to_dict(self, *, answers: bool = True) -> dict[str, Any]:
        """The score as JSON values, with or without the answers."""
        record = asdict(self)
        if not answers:
            del record["answers"]
        return record


def evaluate_sql(
    engine: GeneratingEngine,
    rows: Sequence[TaskRow],
    *,
    render: Callable[[TaskRow], str | list[int]],
    max_tokens: int = 128,
    timeout_s: float = 2.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> SqlScore:
    """Let an engine answer every row greedily and run what it says.

    A row with `extra["database"]` is right when both queries give the same rows, in the same order where
    `extra["ordered"]` asks for it. A row without one is right when the normalised texts are equal.

    Args:
        engine: answers the prompts; its own batch size decides how many at once.
        rows: held-out rows.
        render: makes a row's prompt, as text or token ids.
        max_tokens: most tokens of an answer.
        timeout_s: seconds that one query may run.
        on_progress: called with rows done and rows in all.

    Raises:
        DataError: there are no rows, or a row's own answer does not run on its database (named by place).
    """
    if not rows:
        raise DataError("there are no rows to evaluate", remedy="Give a data set with at least one good row.")
    golds = [_run_gold(row, timeout_s) for row in rows]
    started = time.perf_counter()
    answers: list[Answer] = []
    output_tokens = 0
    for row, gold, reply in zip(rows, golds, _replies(engine, rows, render=render, max_tokens=max_tokens)):
        output_tokens += reply.tokens
        answers.append(_judge(row, gold, reply, timeout_s))
        if on_progress is not None:
            on_progress(len(answers), len(rows))
    return _summarise(answers, golds, output_tokens=output_tokens, seconds=time.perf_counter() - started)


@dataclass(frozen=True, kw_only=True)
class _Reply:
    text: str
    tokens: int = 0
    error: str | None = None


def _replies(
    engine: GeneratingEngine,
    rows: Sequence[TaskRow],
    *,
    render: Callable[[TaskRow], str | list[int]],
    max_tokens: int,
) -> Iterator[_Reply]:
    """One reply per row, in order; a prompt that leaves no room in the context is a reply with an error."""
    room = engine.stats().max_model_len
    prompts: list[str | list[int]] = [render(row) for row in rows]
    too_long = {
        number: f"the prompt has {len(prompt)} tokens, the context {room}"
        for number, prompt in enumerate(prompts)
        if not isinstance(prompt, str) and len(prompt) >= room
    }
    asked = [prompt for number, prompt in enumerate(prompts) if number not in too_long]
    outputs = iter(engine.generate(asked, SamplingParams(max_tokens=max_tokens, temperature=0.0)) if asked else ())
    for number in range(len(rows)):
        if number in too_long:
            yield _Reply(text="", error=too_long[number])
        else:
            output = next(outputs)
            yield _Reply(text=output.text, tokens=output.metrics.output_tokens)


def _run_gold(row: TaskRow, timeout_s: float) -> QueryResult | None:
    database = row.extra.get("database")
    if not database:
        return None
    gold = run_query(database, row.answer, timeout_s=timeout_s)
    if gold.rows is None:
        place = ", ".join(
            f"{label} {value}"
            for label, value in (("file", getattr(row, "file", None)), ("row", getattr(row, "number", None)))
            if value is not None
        )
        raise DataError(
            f"the expected query does not run on its own database ({place or row.instruction!r})", got=gold.error
        )
    return gold


def _judge(row: TaskRow, gold: QueryResult | None, reply: _Reply, timeout_s: float) -> Answer:
    predicted = statement_in(reply.text)
    schema = row.extra.get("database") or row.context
    result = run_query(schema, predicted, timeout_s=timeout_s) if predicted else QueryResult(error="no answer")
    if gold is None:
        right = normalise_sql(predicted) == normalise_sql(row.answer)
    else:
        right = same_result(gold, result, ordered=_is_true(row.extra.get("ordered")))
    return Answer(
        question=row.instruction,
        context=row.context,
        gold=row.answer,
        predicted=predicted,
        right=right,
        valid=result.rows is not None,
        error=reply.error or result.error,
        kind=row.extra.get("kind"),
    )


def _is_true(value: object) -> bool:
    """A flag as JSON, or as the text that CSV makes of it."""
    return value.strip().lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)


def _summarise(
    answers: Sequence[Answer], golds: Sequence[QueryResult | None], *, output_tokens: int, seconds: float
) -> SqlScore:
    executed = sum(gold is not None for gold in golds)
    metric = EXACT if executed == 0 else EXECUTION if executed == len(golds) else f"{EXECUTION} and {EXACT}"
    total = _kind_score(answers)
    kinds = sorted({answer.kind for answer in answers if answer.kind is not None})
    return SqlScore(
        metric=metric,
        score=total.score,
        score_low=total.score_low,
        score_high=total.score_high,
        num_rows=total.num_rows,
        num_right=total.num_right,
        exact_match=_share(normalise_sql(answer.predicted) == normalise_sql(answer.gold) for answer in answers),
        valid_share=_share(answer.valid for answer in answers),
        by_kind={kind: _kind_score([answer for answer in answers if answer.kind == kind]) for kind in kinds},
        answers=tuple(answers),
        output_tokens=output_tokens,
        seconds=seconds,
    )


def _kind_score(answers: Sequence[Answer]) -> KindScore:
    right = sum(answer.right for answer in answers)
    low, high = wilson_interval(right, len(answers))
    return KindScore(num_rows=len(answers), num_right=right, score=right / len(answers), score_low=low, score_high=high)


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """Free text against references: corpus BLEU (0..100), and the share of answers equal to their reference."""

    bleu: float
    signature: str
    """sacrebleu's own description of how the figure was computed."""
    exact_match: float
    num_rows: int
    output_tokens: int
    seconds: float
    answers: tuple[Answer, ...]

    def to_dict(self, *, answers: bool = True) -> dict[str, Any]:
        """The score as JSON values, with or without the answers."""
        record = asdict(self)
        if not answers:
            del record["answers"]
        return record


def evaluate_text(
    engine: GeneratingEngine,
    rows: Sequence[TaskRow],
    *,
    render: Callable[[TaskRow], str | list[int]],
    max_tokens: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> TextScore:
    """Let an engine answer every row greedily and compare the answers with the references by BLEU.

    Args:
        engine, rows, render, max_tokens, on_progress: as for `evaluate_sql`.

    Raises:
        DataError: there are no rows.
    """
    if not rows:
        raise DataError("there are no rows to evaluate", remedy="Give a data set with at least one good row.")
    started = time.perf_counter()
    answers: list[Answer] = []
    output_tokens = 0
    for row, reply in zip(rows, _replies(engine, rows, render=render, max_tokens=max_tokens)):
        output_tokens += reply.tokens
        text = reply.text.strip()
        answers.append(
            Answer(
                question=row.instruction,
                context=row.context,
                gold=row.answer,
                predicted=text,
                right=text.split() == row.answer.split(),
                valid=bool(text),
                error=reply.error,
                kind=row.extra.get("kind"),
            )
        )
        if on_progress is not None:
            on_progress(len(answers), len(rows))
    seconds = time.perf_counter() - started
    score, signature = bleu([answer.predicted for answer in answers], [answer.gold for answer in answers])
    return TextScore(
        bleu=score,
        signature=signature,
        exact_match=_share(answer.right for answer in answers),
        num_rows=len(answers),
        output_tokens=output_tokens,
        seconds=seconds,
        answers=tuple(answers),
    )


def bleu(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Corpus BLEU of one reference per prediction, and sacrebleu's signature.

    Papineni et al., 2002, ACL P02-1040; Post, 2018, arXiv:1804.08771.

    Raises:
        DataError: there is nothing to compare, or the counts differ.
    """
    if not predictions or len(predictions) != len(references):
        raise DataError(
            "BLEU needs one reference per prediction",
            got=f"{len(predictions)} predictions and {len(references)} references",
        )
    from sacrebleu.metrics.bleu import BLEU  # slow to import

    metric = BLEU()
    score = metric.corpus_score(list(predictions), [list(references)])
    return float(score.score), str(metric.get_signature())
