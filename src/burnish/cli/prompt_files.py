"""Prompts from a file or from stdin."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from burnish.errors import DataError


def read_prompts(source: str) -> list[Any]:
    """One prompt a line; a .jsonl file, or lines that begin with a brace, hold {"prompt": ...} or {"messages": [...]}.

    Raises:
        DataError: the file is missing or empty, or a line is malformed; it is named.
    """
    name = "stdin" if source == "-" else source
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {source}") from error
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name} cannot be read as text", got=reason) from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{name} holds no prompts")
    as_json = source.endswith(".jsonl") or lines[0][1].lstrip().startswith("{")
    return [_from_json(name, number, line) if as_json else line for number, line in lines]


def _from_json(name: str, number: int, line: str) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{name} line {number} is not JSON", got=error) from error
    value = row.get("prompt", row.get("messages")) if isinstance(row, dict) else None
    if not isinstance(value, (str, list)) or not value:
        raise DataError(f"{name} line {number} has no prompt", expected='{"prompt": "..."} or {"messages": [...]}')
    is_tokens = "prompt" in row and isinstance(value, list) and all(type(token) is int for token in value)
    if isinstance(value, list) and not is_tokens and not all(map(_is_message, value)):
        expected = '{"role": "...", "content": "..."} each'
        raise DataError(f"{name} line {number} has malformed messages", expected=expected)
    return value


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
