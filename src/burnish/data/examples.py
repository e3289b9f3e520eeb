"""Token ids with a label mask: rows made ready for training, and the facts worth checking before it starts.

Prompt and answer are tokenized apart and joined, so that a prompt has the same ids in training and at inference,
whatever follows it. Prompt labels are -100; the answer and the end token after it are learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from burnish.data.rows import Row
from burnish.data.templates import Template, prompt_tokens
from burnish.data.tokenizer import Tokenizer
from burnish.errors import DataError

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training sequence.

    Attributes:
        tokens: prompt, answer and end token.
        labels: as long as `tokens`; IGNORE where nothing is learned, otherwise the token itself (not shifted).
        num_prompt_tokens: where the answer begins.
        truncated: whether the prompt lost tokens at its start.
        row: what it was made from.
    """

    tokens: list[int]
    labels: list[int]
    num_prompt_tokens: int
    row: Row
    truncated: bool = False


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
class Preflight:
    """Facts that decide whether training can teach a model to answer and to stop.

    Attributes:
        ends_learned: every example ends with an end token that is learned.
        pad_differs_from_eos: the pad token is not an end token (None: there is no pad token). Examples are stored
            without padding and a batch masks what it pads, so an equal pad is a remark, not a fault.
        prompts_are_prefixes: the prompt made for inference has the ids that the training example begins with.
        answers_round_trip: decoding the learned ids gives the answer back.
        end_is_spelled: the template spells out the end marker itself.
    """

    ends_learned: bool
    pad_differs_from_eos: bool | None
    prompts_are_prefixes: bool
    answers_round_trip: bool
    end_is_spelled: bool

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


def make_examples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    template: Template,
    *,
    max_length: int,
    too_long: Literal["drop", "truncate"] = "drop",
) -> ExampleSet:
    """Tokenize rows for training.

    Args:
        rows: what to learn.
        max_length: most tokens of one example, its end token included.
        too_long: "drop" leaves longer rows out; "truncate" cuts the start of their prompts, never the answer or its
            end, and still drops those whose answer alone is too long. Either way they are counted.

    Raises:
        DataError: there are no rows, none fits into max_length, no label is left, or the tokenizer has no end token.
    """
    if not rows:
        raise DataError("there are no rows to make examples of")
    if max_length < 2:
        raise DataError("the longest example is too short", got=f"{max_length} tokens", expected="at least 2")
    if too_long not in ("drop", "truncate"):
        raise DataError("rows that are too long cannot be handled so", got=too_long, expected="drop or truncate")
    kept: list[Example] = []
    dropped: list[Row] = []
    shortest = None
    for row in rows:
        example = make_example(row, tokenizer, template)
        shortest = len(example.tokens) if shortest is None else min(shortest, len(example.tokens))
        if len(example.tokens) > max_length:
            cut = _truncated(example, tokenizer, max_length) if too_long == "truncate" else None
            if cut is None:
                dropped.append(row)
                continue
            example = cut
        kept.append(example)
    if not kept:
        raise DataError(
            f"all {len(rows)} rows are longer than {max_length} tokens",
            got=f"the shortest has {shortest}",
            remedy="Raise --max-length, or keep the ends of prompts with --too-long truncate",
        )
    stats = _stats(kept, num_too_long=len(dropped))
    if stats.label_tokens_total == 0:
        raise DataError(
            "all labels are masked: no token would be learned", remedy="Check the template and the answer column"
        )
    return ExampleSet(
        examples=kept,
        too_long=dropped,
        stats=stats,
        preflight=_preflight(kept, tokenizer, template),
        template=template.name,
        max_length=max_length,
    )


def make_example(row: Row, tokenizer: Tokenizer, template: Template) -> Example:
    """Tokenize one row, whatever its length.

    Raises:
        DataError: the template cannot render it, its answer has no tokens, or the tokenizer has no end token.
    """
    rendered = template.render(row, tokenizer)
    prompt = prompt_tokens(rendered.prompt, tokenizer, add_special_tokens=rendered.add_special_tokens)
    answer = tokenizer.encode(rendered.answer + rendered.end)
    if not answer or not rendered.answer.strip():
        raise DataError(f"all labels are masked in {row.file or 'a row'}, row {row.number}: its answer has no tokens")
    if answer[-1] not in tokenizer.eos_ids:
        if tokenizer.eos_id is None:
            raise DataError(
                f"the tokenizer of {tokenizer.source} names no end token, so a model could not learn to stop",
                expected="eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
            )
        answer.append(tokenizer.eos_id)
    return Example(
        tokens=prompt + answer, labels=[IGNORE] * len(prompt) + answer, num_prompt_tokens=len(prompt), row=row
    )


def _truncated(example: Example, tokenizer: Tokenizer, max_length: int) -> Example | None:
    """The example with the start of its prompt cut (a begin token stays), None where the answer leaves no room."""
    answer = example.tokens[example.num_prompt_tokens :]
    prompt = example.tokens[: example.num_prompt_tokens]
    head = prompt[:1] if prompt and prompt[0] == tokenizer.bos_id else []
    room = max_length - len(answer) - len(head)
    if room < 1:
        return None
    prompt = head + prompt[-room:]
    return Example(
        tokens=prompt + answer,
        labels=[IGNORE] * len(prompt) + answer,
        num_prompt_tokens=len(prompt),
        row=example.row,
        truncated=True,
    )


def _stats(examples: Sequence[Example], *, num_too_long: int) -> ExampleStats:
    lengths = sorted(len(example.tokens) for example in examples)
    learned = sum(label != IGNORE for example in examples for label in example.labels)
    return ExampleStats(
        num_examples=len(examples),
        num_too_long=num_too_long,
        num_truncated=sum(example.truncated for example in examples),
        tokens_total=sum(lengths),
        tokens_mean=round(fmean(lengths), 2),
        tokens_p50=_nearest_rank(lengths, 50),
        tokens_p95=_nearest_rank(lengths, 95),
        tokens_max=lengths[-1],
        label_tokens_total=learned,
        label_share=round(learned / sum(lengths), 4),
    )


def _nearest_rank(ordered: Sequence[int], percent: int) -> int:
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def _preflight(examples: Sequence[Example], tokenizer: Tokenizer, template: Template) -> Preflight:
    sample = examples[:64]  # rendering twice costs as much as tokenizing; the facts hold per template, not per row
    prefixes = round_trips = spelled = True
    for example in sample:
        rendered = template.render(example.row, tokenizer)
        alone = prompt_tokens(
            template.render_prompt(example.row, tokenizer), tokenizer, add_special_tokens=rendered.add_special_tokens
        )
        if not example.truncated:
            prefixes &= example.tokens[: example.num_prompt_tokens] == alone
        learned = example.tokens[example.num_prompt_tokens :]
        round_trips &= tokenizer.decode(learned).strip() == _without_specials(rendered.answer, tokenizer).strip()
        spelled &= bool(rendered.end)
    return Preflight(
        ends_learned=all(example.labels[-1] in tokenizer.eos_ids for example in examples),
        pad_differs_from_eos=None if tokenizer.pad_id is None else tokenizer.pad_id not in tokenizer.eos_ids,
        prompts_are_prefixes=prefixes,
        answers_round_trip=round_trips,
        end_is_spelled=spelled,
    )


def _without_specials(text: str, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(tokenizer.encode(text)) if tokenizer.special_ids & set(tokenizer.encode(text)) else text
