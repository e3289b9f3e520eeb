"""One row as token ids with a label mask: instructions, completions, plain text, and whole conversations.

Prompt and answer are tokenized apart and joined, so that a prompt has the same ids in training and at inference,
whatever follows it. Prompt labels are -100; the answer and the end token after it are learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from burnish.data.rows import Row
from burnish.data.templates import Template, prompt_tokens, row_messages
from burnish.data.tokenizer import Tokenizer
from burnish.errors import DataError

IGNORE = -100
TooLong = Literal["drop", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training sequence.

    Attributes:
        tokens: prompt, answer and end token; of a conversation, all turns.
        labels: as long as `tokens`; IGNORE where nothing is learned, otherwise the token itself (not shifted).
        num_prompt_tokens: where the (last) answer begins.
        row: what it was made from; of a conversation, its last turn.
        truncated: whether it lost tokens, at the start of its prompt or, of plain text, at its end.
        end_cut: whether its end token was among them.
        num_answers: answers that are learned.
        key: 64 bits of the row's content; turns of one conversation share theirs.
    """

    tokens: list[int]
    labels: list[int]
    num_prompt_tokens: int
    row: Row
    truncated: bool = False
    end_cut: bool = False
    num_answers: int = 1
    key: int = 0


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
        tokens=prompt + answer,
        labels=[IGNORE] * len(prompt) + answer,
        num_prompt_tokens=len(prompt),
        row=row,
        key=content_key(row),
    )


def join_turns(turns: Sequence[Example]) -> Example | None:
    """One sequence that learns the answers of all turns; None where it would not be the same as learning them apart.

    It is the same if each turn, answer and end included, is token by token what the next turn's prompt begins with.
    Templates that write earlier turns otherwise (without their thoughts, say) and tokenizers that see another text in
    them do not allow it.

    Args:
        turns: examples of one conversation, oldest first.
    """
    last = turns[-1]
    labels = list(last.labels)
    for turn, following in pairwise(turns):
        size = len(turn.tokens)
        if size > following.num_prompt_tokens or following.tokens[:size] != turn.tokens:
            return None
        labels[turn.num_prompt_tokens : size] = turn.tokens[turn.num_prompt_tokens :]
    return replace(last, labels=labels, num_answers=len(turns), key=turns[0].key)


def shorten(example: Example, tokenizer: Tokenizer, max_length: int) -> Example | None:
    """Cut to `max_length` tokens: the start of the prompt, or, where there is no prompt, the end of the text.

    A begin token stays, and so does an answer with its end. None where the answer leaves no room for a prompt.
    """
    answer = example.tokens[example.num_prompt_tokens :]
    prompt = example.tokens[: example.num_prompt_tokens]
    head = prompt[:1] if prompt and prompt[0] == tokenizer.bos_id else []
    if len(prompt) == len(head):  # plain text
        tokens = example.tokens[:max_length]
        return replace(
            example, tokens=tokens, labels=example.labels[:max_length], truncated=True, end_cut=len(tokens) > len(head)
        )
    room = max_length - len(answer) - len(head)
    if room < 1:
        return None
    prompt = head + prompt[-room:]
    return replace(
        example,
        tokens=prompt + answer,
        labels=[IGNORE] * len(prompt) + answer,
        num_prompt_tokens=len(prompt),
        truncated=True,
    )


def content_key(row: Row) -> int:
    """64 bits of what the row says (roles, words; white space aside), independent of where it stands and of a seed."""
    said = [(str(message.get("role")), str(message.get("content"))) for message in row_messages(row)]
    digest = hashlib.blake2b(digest_size=8)
    for role, text in [*said, ("assistant", row.answer)]:
        digest.update(f"{role}\x1f{' '.join(text.split())}\x1e".encode())
    return int.from_bytes(digest.digest(), "little")
