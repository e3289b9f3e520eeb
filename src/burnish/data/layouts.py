"""What the columns of a data set mean: recognised layouts, a mapping by hand, and one raw row made into fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from burnish.errors import DataError

FIELDS = ("instruction", "context", "answer")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which columns hold a row's fields; `chat` is the column with a conversation instead, `text` one with a text.

    Attributes:
        name: "alpaca", "sql", "prompt", "chat", "question", "text" or "columns" (mapped by hand).
        context_required: whether a row without its context column is a bad row.
    """

    name: str
    instruction: str = ""
    answer: str = ""
    context: str | None = None
    context_required: bool = False
    chat: str | None = None
    text: str | None = None

    @property
    def required(self) -> tuple[str, ...]:
        if self.chat or self.text:
            return (self.chat or self.text or "",)
        context = (self.context,) if self.context and self.context_required else ()
        return (self.instruction, *context, self.answer)

    @property
    def columns(self) -> frozenset[str]:
        """Every column that the layout reads."""
        return frozenset(filter(None, (self.instruction, self.context, self.answer, self.chat, self.text)))


LAYOUTS = (
    Layout(name="sql", instruction="question", context="context", answer="answer", context_required=True),
    Layout(name="alpaca", instruction="instruction", context="input", answer="output"),
    Layout(name="chat", chat="messages"),
    Layout(name="chat", chat="conversations"),
    Layout(name="prompt", instruction="prompt", answer="completion"),
    Layout(name="prompt", instruction="prompt", answer="response"),
    Layout(name="columns", instruction="instruction", context="context", answer="answer"),
    Layout(name="question", instruction="question", answer="answer"),
)
TEXT = Layout(name="text", text="text")  # completed, not answered: only where texts are asked for


class BadValueError(Exception):
    """A row's value is unusable; the text says which and why. Caught by the reader of rows, never shown as such."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """One training row: what is asked, what it is asked about, what is to be answered; `history` for conversations."""

    instruction: str
    context: str
    answer: str
    history: tuple[dict[str, str], ...] = ()


def choose_layout(
    found: Iterable[str], *, columns: Mapping[str, str] | None, source: str, texts: bool = False
) -> Layout:
    """The layout that fits the columns found, or the one that `columns` asks for.

    Args:
        found: column names in the data.
        columns: field -> column name, such as {"instruction": "question", "answer": "query"}; instruction and answer
            must be there, context may be.
        source: the data set's name, for messages of errors.
        texts: rows with nothing but a text will do, too; their column may be mapped as "text".

    Raises:
        DataError: a mapped column is missing, or no known layout fits; found and expected columns are named.
    """
    names = list(dict.fromkeys(found))
    if columns is not None:
        return _mapped_layout(names, columns, source=source, texts=texts)
    for layout in (*LAYOUTS, TEXT) if texts else LAYOUTS:
        if set(layout.required) <= set(names):
            return layout
    wanted = sorted({name for layout in LAYOUTS for name in layout.required} - set(names))
    hints = [f"{close[0]} for {name}" for name in names if (close := get_close_matches(name, wanted, n=1, cutoff=0.75))]
    hint = f"Did you mean {' and '.join(hints)}? " if hints else ""
    known = list(dict.fromkeys("+".join(layout.required) for layout in LAYOUTS)) + ["text"] * texts
    raise DataError(
        f"the columns of {source} fit no known layout",
        got=", ".join(names) or "no columns",
        expected=" or ".join(known),
        remedy=f"{hint}Name them with --columns instruction=COLUMN,answer=COLUMN[,context=COLUMN]",
    )


def _mapped_layout(found: list[str], columns: Mapping[str, str], *, source: str, texts: bool) -> Layout:
    known = FIELDS
    if texts and "text" in columns:  # a text stands alone
        known = ("text",)
    for field in columns:
        if field not in known:
            close = get_close_matches(field, known, n=1)
            raise DataError(
                "the column mapping has an unknown field",
                got=field,
                expected=", ".join(known),
                remedy=f"Did you mean {close[0]}?" if close else None,
            )
    missing = [field for field in ("instruction", "answer") if field in known and not columns.get(field)]
    if missing:
        raise DataError(
            f"the column mapping does not say which column holds the {' and the '.join(missing)}",
            got=", ".join(f"{field}={name}" for field, name in columns.items()) or "nothing",
            expected="instruction=COLUMN,answer=COLUMN[,context=COLUMN]",
        )
    for field, name in columns.items():
        if name not in found:
            close = get_close_matches(name, found, n=1)
            raise DataError(
                f"{source} has no column {name!r} for the {field}",
                got=", ".join(found) or "no columns",
                remedy=f"Did you mean {close[0]}?" if close else None,
            )
    if known == ("text",):
        return Layout(name="text", text=columns["text"])
    return Layout(
        name="columns",
        instruction=columns["instruction"],
        answer=columns["answer"],
        context=columns.get("context"),
    )


def read_fields(value: object, layout: Layout) -> list[Fields]:
    """Fields of one raw row; a conversation gives one per assistant turn, each with what was said before it.

    Raises:
        BadValueError: the row is no object, or a value is missing, empty or of the wrong type.
    """
    if not isinstance(value, Mapping):
        raise BadValueError(f"the row is {_kind(value)}, not an object")
    if layout.chat:
        return _conversation(value, layout.chat)
    if layout.text:
        return [Fields(instruction="", context="", answer=_text(value, layout.text, empty="refused"))]
    context = ""
    if layout.context:
        context = _text(value, layout.context, empty="allowed" if not layout.context_required else "refused")
    return [
        Fields(
            instruction=_text(value, layout.instruction, empty="refused"),
            context=context,
            answer=_text(value, layout.answer, empty="refused"),
        )
    ]


def _text(row: Mapping[str, Any], column: str, *, empty: str) -> str:
    value = row.get(column)
    if isinstance(value, str):
        if empty == "refused" and not value.strip():
            raise BadValueError(f"{column} is empty")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadValueError(f"{column} has lone surrogates, which no UTF-8 text has") from None
        return value
    if value is None:
        if empty == "allowed":
            return ""
        raise BadValueError(f"{column} is {'null' if column in row else 'missing'}")
    raise BadValueError(f"{column} is {_kind(value)}, not text")


def _conversation(row: Mapping[str, Any], column: str) -> list[Fields]:
    messages = row.get(column)
    if messages is None:
        raise BadValueError(f"{column} is {'null' if column in row else 'missing'}")
    if not isinstance(messages, list):
        raise BadValueError(f"{column} is {_kind(messages)}, not a list")
    said: list[dict[str, str]] = []
    turns: list[Fields] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise BadValueError(f"message {number} of {column} is {_kind(message)}, not an object")
        speaker, text = ("role", "content") if "role" in message else ("from", "value")
        role = _ROLES.get(str(message.get(speaker)))
        if role is None:
            raise BadValueError(f"message {number} of {column} has the unknown {speaker} {message.get(speaker)!r}")
        content = message.get(text)
        if not isinstance(content, str):
            raise BadValueError(f"message {number} of {column} has {_kind(content)} as {text}, not text")
        asked = next((earlier for earlier in reversed(said) if earlier["role"] == "user"), None)
        if role == "assistant" and content.strip() and asked is not None:
            turns.append(Fields(instruction=asked["content"], context="", answer=content, history=tuple(said)))
        said.append({"role": role, "content": content})
    if not turns:
        raise BadValueError(f"{column} has no assistant message that answers a user")
    return turns


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", dict: "an object"}
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}")
