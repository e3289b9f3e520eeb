"""Prompt templates: how a row becomes the text a model reads and the text it learns to answer.

`chat` is the tokenizer's own chat template, `alpaca` the published Alpaca headings, `sql-context` three short headings
for a question about a schema, `plain` the row's words as they stand, without headings. `auto` means plain for texts
that answer nothing; else chat where the tokenizer has a template; without one, sql-context for rows that came as
question, context and answer, and alpaca for everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

from burnish.data.rows import Row, RowSet, RowStream
from burnish.data.tokenizer import Tokenizer
from burnish.errors import ConfigError, DataError

# The wording that Alpaca-style models were tuned on; it is a format, so it stays to the letter.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_ALPACA_PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A row as text.

    Attributes:
        prompt: what the model reads, the same in training and at inference.
        answer: what it learns to write after that.
        end: the end marker after the answer that the template spells out ("<|im_end|>"), cut after its first end token;
            "" where the tokenizer's end token is to follow.
        add_special_tokens: whether the tokenizer puts its begin token first (a chat template spells it out itself).
    """

    prompt: str
    answer: str
    end: str = ""
    add_special_tokens: bool = True


class Template(Protocol):
    """A way to write rows as prompts and answers."""

    @property
    def name(self) -> str: ...

    def render_prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        """The prompt alone, as at inference."""
        ...

    def render(self, row: Row, tokenizer: Tokenizer) -> Rendered:
        """Prompt and answer, as in training.

        Raises:
            DataError: the row or the tokenizer does not fit the template.
        """
        ...


def row_messages(row: Row) -> list[dict[str, Any]]:
    """The conversation before the row's answer: its own messages, or context and instruction as one user message."""
    messages = row.extra.get("messages")
    if isinstance(messages, list) and messages:
        return [dict(message) for message in messages]
    content = f"{row.context}\n\n{row.instruction}" if row.context.strip() else row.instruction
    return [{"role": "user", "content": content}]


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The tokenizer's chat template; the schema or passage goes before the question in the user's message."""

    name: str = "chat"

    def render_prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        return tokenizer.render_chat(row_messages(row))

    def render(self, row: Row, tokenizer: Tokenizer) -> Rendered:
        messages = row_messages(row)
        prompt = tokenizer.render_chat(messages)
        whole = tokenizer.render_chat(
            [*messages, {"role": "assistant", "content": row.answer}], add_generation_prompt=False
        )
        rest = whole[len(prompt) :]
        answer = row.answer if row.answer in rest else row.answer.strip()  # many templates trim contents
        if not whole.startswith(prompt) or answer not in rest:
            where = "starts" if not whole.startswith(prompt) else "goes on"
            raise DataError(
                f"the chat template of {tokenizer.source} does not round trip",
                got=f"a conversation with its answer that {where} otherwise than the prompt alone",
                remedy="Choose another template: --template alpaca or --template sql-context",
            )
        cut = rest.rindex(answer) + len(answer)  # text before the answer, such as an empty thought, is learned too
        return Rendered(
            prompt=prompt, answer=rest[:cut], end=_first_end(rest[cut:], tokenizer), add_special_tokens=False
        )


@dataclass(frozen=True, kw_only=True)
class AlpacaTemplate:
    """The Alpaca format: a preamble, then headings for instruction, input (if any) and response."""

    name: str = "alpaca"

    def render_prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        _refuse_conversation(row, self.name)
        preamble, given = _ALPACA_PLAIN, ""
        if row.context.strip():
            preamble, given = _ALPACA_WITH_INPUT, f"### Input:\n{row.context}\n\n"
        return f"{preamble}\n\n### Instruction:\n{row.instruction}\n\n{given}### Response:\n"

    def render(self, row: Row, tokenizer: Tokenizer) -> Rendered:
        return Rendered(prompt=self.render_prompt(row, tokenizer), answer=row.answer)


@dataclass(frozen=True, kw_only=True)
class SqlContextTemplate:
    """Headings for a question, the schema it is about, and the result to write."""

    name: str = "sql-context"

    def render_prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        _refuse_conversation(row, self.name)
        return f"# Instruction:\n{row.instruction}\n\n# context:\n{row.context}\n\n# result:\n"

    def render(self, row: Row, tokenizer: Tokenizer) -> Rendered:
        prompt = self.render_prompt(row, tokenizer)
        if not row.context.strip():
            raise DataError(
                f"the template {self.name} needs a context, and {row.file}, row {row.number} has none",
                remedy="Choose --template alpaca or plain, or name the column with "
                "--columns instruction=COLUMN,answer=COLUMN,context=COLUMN",
            )
        return Rendered(prompt=prompt, answer=row.answer)


@dataclass(frozen=True, kw_only=True)
class PlainTemplate:
    """No headings: the prompt as it stands and its completion; of a text without a prompt, every token is learned."""

    name: str = "plain"

    def render_prompt(self, row: Row, tokenizer: Tokenizer) -> str:
        _refuse_conversation(row, self.name)
        return f"{row.context}\n\n{row.instruction}" if row.context.strip() else row.instruction

    def render(self, row: Row, tokenizer: Tokenizer) -> Rendered:
        return Rendered(prompt=self.render_prompt(row, tokenizer), answer=row.answer)


TEMPLATES: Mapping[str, Template] = {
    template.name: template for template in (ChatTemplate(), AlpacaTemplate(), SqlContextTemplate(), PlainTemplate())
}


def pick_template(name: str, tokenizer: Tokenizer, rows: RowSet | RowStream | None = None) -> Template:
    """The template of that name, or for "auto" the one that fits tokenizer and rows (see the top of this file).

    Raises:
        ConfigError: no template has this name.
        DataError: chat is asked for, and the tokenizer has no chat template; or headings for texts without a prompt.
    """
    layout = None if rows is None else rows.layout
    if name == "auto":
        if layout == "text":
            return TEMPLATES["plain"]
        if tokenizer.chat_template is not None:
            return TEMPLATES["chat"]
        return TEMPLATES["sql-context" if layout == "sql" else "alpaca"]
    if layout == "text" and name in TEMPLATES and name != "plain":
        raise DataError(f"the template {name} needs prompts, and the rows are texts", remedy="Choose --template plain")
    if name not in TEMPLATES:
        known = ["auto", *TEMPLATES]
        close = get_close_matches(name, known, n=1)
        raise ConfigError(
            f"there is no prompt template {name!r}",
            expected=", ".join(known),
            remedy=f"Did you mean {close[0]}?" if close else None,
        )
    if name == "chat" and tokenizer.chat_template is None:
        raise DataError(
            f"the tokenizer of {tokenizer.source} has no chat template",
            remedy="Choose --template alpaca or --template sql-context",
        )
    return TEMPLATES[name]


def prompt_tokens(prompt: str, tokenizer: Tokenizer, *, add_special_tokens: bool) -> list[int]:
    """Token ids of a rendered prompt; the one place where training and inference turn prompts into ids."""
    return tokenizer.encode_prompt(prompt) if add_special_tokens else tokenizer.encode(prompt)


def row_prompt_tokens(row: Row, tokenizer: Tokenizer, template: Template) -> list[int]:
    """Token ids of a row's prompt at inference; a training example of the same row begins with exactly these."""
    prompt = template.render_prompt(row, tokenizer)
    return prompt_tokens(prompt, tokenizer, add_special_tokens=not isinstance(template, ChatTemplate))


def _refuse_conversation(row: Row, name: str) -> None:
    messages = row.extra.get("messages")
    if isinstance(messages, list) and len(messages) > 1:
        raise DataError(
            f"the template {name} cannot render the conversation in {row.file}, row {row.number}",
            got=f"{len(messages)} messages before the answer",
            expected="one",
            remedy="Choose --template chat and a tokenizer with a chat template",
        )


def _first_end(text: str, tokenizer: Tokenizer) -> str:
    """`text` up to and with its first end token, trailing white space gone where there is none."""
    ends = sorted(_end_texts(tokenizer), key=lambda end: text.find(end))
    for end in ends:
        if end in text:
            return text[: text.index(end) + len(end)]
    return text.rstrip()


def _end_texts(tokenizer: Tokenizer) -> Iterator[str]:
    for token_id in tokenizer.eos_ids:
        text = tokenizer.backend.id_to_token(token_id)
        if text:
            yield text
