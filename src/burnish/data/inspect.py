"""What `burnish data inspect` shows: rows as the model will see them, token by token, with what is learned of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from burnish.data.encoding import IGNORE, Example
from burnish.data.examples import ExampleSet
from burnish.data.rows import RowSet
from burnish.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenView:
    """One token of an example: its id, the vocabulary's spelling, the text it stands for, and whether it is learned."""

    id: int
    token: str
    text: str
    learned: bool
    special: bool


@dataclass(frozen=True, kw_only=True)
class RowView:
    """One row as the model will see it; `segments` joins its text in runs of equal mask: [(text, learned), ...]."""

    file: str
    number: int
    text: str
    segments: list[tuple[str, bool]]
    tokens: list[TokenView]
    num_tokens: int
    num_learned: int
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The whole answer of `burnish data inspect`.

    Attributes:
        facts: (statement, "ok" | "remark" | "problem"), for people.
        stats: as `ExampleStats.to_dict`, with num_rows and num_bad_rows.
        preflight: as `Preflight.to_dict`.
    """

    source: str
    layout: str
    columns: list[str]
    template: str
    max_length: int
    rows: list[RowView]
    bad_rows: list[str]
    stats: dict[str, Any]
    facts: list[tuple[str, str]]
    preflight: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


def inspect_rows(
    row_set: RowSet, example_set: ExampleSet, tokenizer: Tokenizer, *, num_rows: int = 3, num_bad_rows: int = 10
) -> Inspection:
    """Describe what training on these examples would teach.

    Args:
        row_set: what was read.
        example_set: what `make_examples` made of it.
        num_rows: how many examples to show in full.
        num_bad_rows: how many unusable rows to name; all are counted.
    """
    stats = example_set.stats.to_dict() | {"num_rows": len(row_set.rows), "num_bad_rows": len(row_set.bad_rows)}
    return Inspection(
        source=row_set.source,
        layout=row_set.layout,
        columns=list(row_set.columns),
        template=example_set.template,
        max_length=example_set.max_length,
        rows=[_view(example, tokenizer) for example in example_set.examples[:num_rows]],
        bad_rows=[str(bad) for bad in row_set.bad_rows[:num_bad_rows]],
        stats=stats,
        facts=_facts(row_set, example_set, tokenizer),
        preflight=example_set.preflight.with_bad_rows([bad.reason for bad in row_set.bad_rows]).to_dict(),
    )


def _view(example: Example, tokenizer: Tokenizer) -> RowView:
    learned = [label != IGNORE for label in example.labels]
    texts: list[str] = []
    segments: list[tuple[str, bool]] = []
    # A stream per run: a character held back at the end of a prompt must not show up among the learned ones.
    for flag, run in groupby(zip(example.tokens, learned, strict=True), key=itemgetter(1)):
        pieces = _texts([token for token, _ in run], tokenizer)
        texts += pieces
        segments.append(("".join(pieces), flag))
    return RowView(
        file=example.row.file,
        number=example.row.number,
        text="".join(texts),
        segments=segments,
        tokens=[
            TokenView(
                id=token_id,
                token=tokenizer.token(token_id),
                text=text,
                learned=flag,
                special=token_id in tokenizer.special_ids,
            )
            for token_id, text, flag in zip(example.tokens, texts, learned, strict=True)
        ],
        num_tokens=len(example.tokens),
        num_learned=sum(learned),
        truncated=example.truncated,
    )


def _texts(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text each token adds; characters of several tokens stand with the last of them."""
    stream = tokenizer.stream_decoder(skip_special_tokens=False)
    texts = [stream.push(token_id) for token_id in tokens]
    if texts:
        texts[-1] += stream.flush()
    return texts


def _facts(row_set: RowSet, example_set: ExampleSet, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """What was found to be in order, then every remark and problem."""
    flight, stats = example_set.preflight, example_set.stats
    in_order = [
        (flight.ends_learned, "every answer ends with a learned end token"),
        (flight.num_wrong_masks == 0, "exactly the answers are learned"),
        (flight.prompts_are_prefixes, "prompts have the same token ids in training and at inference"),
        (flight.answers_round_trip, "answers survive tokenizing and decoding"),
        (flight.pad_differs_from_eos is True, "the pad token is not an end token"),
        (
            flight.pad_differs_from_eos is None,
            "the tokenizer has no pad token; padding is masked, so none is needed",
        ),
    ]
    facts = [(statement, "ok") for holds, statement in in_order if holds]
    facts += [(statement, "problem") for statement in flight.errors]
    if tokenizer.max_length is not None and stats.tokens_max > tokenizer.max_length:
        facts.append((f"the longest example exceeds the tokenizer's limit of {tokenizer.max_length} tokens", "problem"))
    facts += [(statement, "remark") for statement in flight.warnings]
    if row_set.bad_rows and not flight.num_bad_rows:
        facts.append((f"{len(row_set.bad_rows)} rows are unusable", "remark"))
    return facts
