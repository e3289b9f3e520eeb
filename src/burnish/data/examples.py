"""Rows made ready for training, and the facts worth checking before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from burnish.data.encoding import IGNORE, Example, TooLong, join_turns, make_example, shorten
from burnish.data.preflight import Preflight, PreflightCounter
from burnish.data.rows import Row
from burnish.data.templates import Template
from burnish.data.tokenizer import Tokenizer
from burnish.errors import DataError

__all__ = ["IGNORE", "Example", "ExampleSet", "ExampleStats", "Learn", "iter_examples", "make_example", "make_examples"]

Learn = Literal["all", "last"]
LEARN: tuple[str, ...] = get_args(Learn)


@dataclass(frozen=True, kw_only=True)
class ExampleStats:
    """Lengths in tokens over the examples kept, and what became of the others."""

    num_examples: int
    num_too_long: int
    num_truncated: int
    tokens_total: int
    tokens_mean: float
    tokens_p50: int
    tokens_p95: int
    tokens_max: int
    label_tokens_total: int
    label_share: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ExampleSet:
    """Examples, the rows that were too long for them, and the figures and facts about both."""

    examples: list[Example]
    too_long: list[Row]
    stats: ExampleStats
    preflight: Preflight
    template: str
    max_length: int

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A row that does not fit."""

    row: Row
    num_tokens: int


def make_examples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    too_long: TooLong = "drop",
    learn: Learn = "all",
) -> ExampleSet:
    """Tokenize rows for training.

    Args:
        rows: what to learn.
        max_length: most tokens of one example, its end token included.
        too_long: "drop" leaves longer rows out; "truncate" cuts the start of their prompts, never the answer or its
            end, and still drops those whose answer alone is too long. Plain text, which has no prompt, loses its end.
            Either way they are counted.
        learn: of conversations, "all" answers or the "last" one.

    Raises:
        DataError: there are no rows, none fits into max_length, no label is left, or the tokenizer has no end token.
    """
    if not rows:
        raise DataError("there are no rows to make examples of")
    kept: list[Example] = []
    dropped: list[LeftOut] = []
    counter = PreflightCounter(tokenizer, template)
    for made in iter_examples(rows, tokenizer, template, max_length=max_length, too_long=too_long, learn=learn):
        if isinstance(made, LeftOut):
            dropped.append(made)
        else:
            kept.append(made)
            counter.add(made)
    if not kept:
        raise nothing_fits(len(rows), shortest=min(left.num_tokens for left in dropped), max_length=max_length)
    stats = example_stats(
        [len(example.tokens) for example in kept],
        num_labels=counter.num_labels,
        num_too_long=len(dropped),
        num_truncated=counter.num_truncated,
    )
    return ExampleSet(
        examples=kept,
        too_long=[left.row for left in dropped],
        stats=stats,
        preflight=counter.result(num_too_long=len(dropped), max_length=max_length),
        template=template.name,
        max_length=max_length,
    )


def iter_examples(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    too_long: TooLong = "drop",
    learn: Learn = "all",
) -> Iterator[Example | LeftOut]:
    """`make_examples` one at a time, holding one conversation in memory.

    A conversation whose answers are all learned is one example where `join_turns` allows it and it fits; otherwise each
    answer is one, with what was said before it.

    Raises:
        DataError: as `make_example`, or an option is not known.
    """
    if max_length < 2:
        raise DataError("the longest example is too short", got=f"{max_length} tokens", expected="at least 2")
    if too_long not in get_args(TooLong):
        raise DataError("rows that are too long cannot be handled so", got=too_long, expected="drop or truncate")
    if learn not in LEARN:
        raise DataError("conversations cannot be learned so", got=learn, expected="all or last")
    for _, group in groupby(enumerate(rows), key=_conversation):
        turns = [make_example(row, tokenizer, template) for _, row in group]
        if learn == "last":
            turns = [replace(turns[-1], key=turns[0].key)]
        elif len(turns) > 1:
            joined = join_turns(turns)
            turns = [replace(turn, key=turns[0].key) for turn in turns]
            if joined is not None and len(joined.tokens) <= max_length:
                turns = [joined]
        for example in turns:
            size = len(example.tokens)
            if size > max_length:
                cut = shorten(example, tokenizer, max_length) if too_long == "truncate" else None
                if cut is None:
                    yield LeftOut(row=example.row, num_tokens=size)
                    continue
                example = cut
            yield example


def _conversation(numbered: tuple[int, Row]) -> tuple[object, ...]:
    """Equal for turns of one conversation, which come one after the other; unique for any other row."""
    number, row = numbered
    return (row.file, row.number) if "messages" in row.extra else (None, number)


def example_stats(
    lengths: Sequence[int] | NDArray[np.int32], *, num_labels: int, num_too_long: int, num_truncated: int
) -> ExampleStats:
    """Figures over examples of these lengths.

    Raises:
        DataError: nothing would be learned.
    """
    if num_labels == 0:
        raise DataError(
            "all labels are masked: no token would be learned", remedy="Check the template and the answer column"
        )
    ordered = np.sort(np.asarray(lengths, dtype=np.int32))
    total = int(ordered.sum(dtype=np.int64))
    return ExampleStats(
        num_examples=len(ordered),
        num_too_long=num_too_long,
        num_truncated=num_truncated,
        tokens_total=total,
        tokens_mean=round(total / len(ordered), 2),
        tokens_p50=_nearest_rank(ordered, 50),
        tokens_p95=_nearest_rank(ordered, 95),
        tokens_max=int(ordered[-1]),
        label_tokens_total=num_labels,
        label_share=round(num_labels / total, 4),
    )


def nothing_fits(num_rows: int, *, shortest: int, max_length: int) -> DataError:
    """The error of rows that are all too long."""
    return DataError(
        f"all {num_rows} rows are longer than {max_length} tokens",
        got=f"the shortest has {shortest}",
        remedy="Raise --max-length, or keep the ends of prompts with --too-long truncate",
    )


def _nearest_rank(ordered: NDArray[np.int32], percent: int) -> int:
    return int(ordered[max(0, -(-len(ordered) * percent // 100) - 1)])
