"""Rendering of chat templates: the Jinja programs that come with a tokenizer and are not to be trusted.

They run in Jinja's immutable sandbox, with the whitespace rules, filters and globals that template authors count on
(`raise_exception`, `tojson`, `strftime_now`, loop controls, generation blocks).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from burnish.errors import DataError

Message = Mapping[str, Any]


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`: marks an assistant's words; renders as its body."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML; prompts want them as they are.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise unless `messages` is a list of {"role": text, "content": text or list of blocks}.

    Raises:
        DataError: there are no messages, or one of them is malformed; its number is named.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise DataError("chat messages are not a list", got=type(messages).__name__, expected="a list of messages")
    if not messages:
        raise DataError("there are no chat messages", expected="at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise DataError(f"chat message {number} is not an object", got=type(message).__name__)
        if not isinstance(message.get("role"), str):
            raise DataError(f"chat message {number} has no role", got=sorted(message), expected="role and content")
        content = message.get("content")
        if not isinstance(content, str | list) and "tool_calls" not in message:
            kind = "nothing" if content is None else type(content).__name__
            raise DataError(f"chat message {number} has no text content", got=kind, expected="text")


def render_chat_template(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
    source: str,
) -> str:
    """Render a conversation to the text that the model reads.

    Args:
        template: Jinja source.
        messages: {"role", "content"} objects, oldest first.
        add_generation_prompt: whether the text ends where the assistant's answer begins.
        special_tokens: variables such as bos_token and eos_token.
        source: where the template came from, for messages of errors.

    Raises:
        DataError: the messages are malformed, or the template does not compile, refuses them or fails on them.
    """
    check_messages(messages)
    plain = json.loads(json.dumps([dict(message) for message in messages]))  # templates see plain values only
    try:
        return _compile(template).render(
            messages=plain, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special_tokens
        )
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template in {source} does not compile (line {error.lineno})",
            got=error.message,
            remedy="Choose another template, such as alpaca or sql-context",
        ) from error
    except Exception as error:  # a template is a foreign program: whatever it raises is its own failure
        raise DataError(
            f"the chat template in {source} refused the messages",
            got=str(error) or type(error).__name__,
            remedy="Choose another template, or change the messages' roles",
        ) from error
