"""What is asked of the queue: items read from a file, checked before anything is sent. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from burnish.engine.sampling import SamplingParams
from burnish.errors import DataError, RequestError

PRIORITIES = ("low", "normal", "high")
MAX_PROMPT_CHARACTERS = 4 << 20
_KEYS = ("prompt", "messages", "id", "params", "priority")
_PARAMS = tuple(field.name for field in fields(SamplingParams))
_EXPECTED = '{"prompt": "..."} or {"messages": [...]}'


class Key(NamedTuple):
    """What an item is known by, everywhere."""

    job_id: str
    item_id: int


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt of a job.

    Attributes:
        prompt: text, token ids or chat messages.
        name: the row's own "id", handed back with the result.
        params: sampling parameters of this item alone, over the job's.
        rank: of its priority: 0 is the highest and runs first.
    """

    prompt: str | list[Any]
    name: str | None = None
    params: Mapping[str, Any] | None = None
    rank: int = 1


def rank_of(priority: str, *, where: str) -> int:
    """0 for "high", 2 for "low".

    Raises:
        DataError: there is no such priority.
    """
    if priority not in PRIORITIES:
        raise DataError(f"{where} has no such priority", got=repr(priority), expected=", ".join(PRIORITIES))
    return len(PRIORITIES) - 1 - PRIORITIES.index(priority)


def merged_params(job: Mapping[str, Any], own: Mapping[str, Any] | None) -> SamplingParams:
    """The parameters of one item.

    Raises:
        RequestError: one is unknown or out of range.
    """
    given = {**job, **(own or {})}
    unknown = [name for name in given if name not in _PARAMS]
    if unknown:
        close = get_close_matches(unknown[0], _PARAMS, n=1)
        raise RequestError(
            f"there is no parameter {unknown[0]!r}",
            expected=None if close else ", ".join(_PARAMS),
            remedy=f"Did you mean {close[0]}?" if close else None,
        )
    if isinstance(bias := given.get("logit_bias"), Mapping):  # JSON's keys are texts
        given["logit_bias"] = [(_token_id(key), value) for key, value in bias.items()]
    try:
        return SamplingParams(**given)
    except TypeError as error:  # a value of the wrong kind where a list belongs
        raise RequestError("a parameter is of the wrong kind", got=error) from error


def _token_id(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20 else key


def read_items(path: Path, *, name: str, rank: int = 1, as_chat: bool = False) -> Iterator[Item]:
    """Items of a file, one a line; only one is in memory at a time.

    Lines of a .jsonl file, or of one whose first line begins with a brace, are objects with "prompt" or "messages", and
    if wanted "id", "params" (as `SamplingParams`) and "priority". Lines of any other file are prompts.

    Args:
        path: the file; `name` is what to call it in errors.
        rank: of items that name no priority.
        as_chat: put prompts that are text into a user's message.

    Raises:
        DataError: the file is missing, empty or no text, or a line is malformed; it is named.
    """
    count = 0
    try:
        with path.open(encoding="utf-8") as lines:
            as_json = None
            for number, line in enumerate(lines, 1):
                text = line.strip("\r\n")
                if not text.strip():
                    continue
                if as_json is None:
                    as_json = name.endswith((".jsonl", ".ndjson")) or text.lstrip().startswith("{")
                if len(text) > MAX_PROMPT_CHARACTERS:
                    raise DataError(
                        f"{name} line {number} is too long",
                        got=f"{len(text)} characters",
                        expected=f"at most {MAX_PROMPT_CHARACTERS}",
                    )
                item = _item(text, f"{name} line {number}", rank) if as_json else Item(prompt=text, rank=rank)
                if as_chat and isinstance(item.prompt, str):
                    message = [{"role": "user", "content": item.prompt}]
                    item = Item(prompt=message, name=item.name, params=item.params, rank=item.rank)
                count += 1
                yield item
    except FileNotFoundError as error:
        raise DataError(f"there is no file {name}") from error
    except (OSError, UnicodeError) as error:
        raise DataError(f"{name} cannot be read as text", got=getattr(error, "strerror", None) or error) from error
    if not count:
        raise DataError(f"{name} holds no prompts")


def digest_of(items: Iterator[Item], params: Mapping[str, Any]) -> tuple[int, str]:
    """How many items there are, and a hash of all of them with the job's parameters.

    Raises:
        DataError: parameters of an item do not go with the job's.
        RequestError: the job's own are out of range.
    """
    digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode())
    count = 0
    for item in items:
        try:
            merged_params(params, item.params)  # a bad parameter is told now, and not by a thousand error rows
        except RequestError as error:
            if item.params is None:
                raise
            raise _of(f"item {count}", error) from error
        digest.update(json.dumps([item.prompt, item.name, item.params, item.rank], sort_keys=True).encode())
        count += 1
    return count, digest.hexdigest()


def _item(line: str, where: str, rank: int) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError
        raise DataError(f"{where} is not JSON", got=error) from error
    if "\\ud" in line.lower():
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # no database and no tokenizer takes it
            raise DataError(f"{where} holds half of a surrogate pair, which is no character") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is no JSON object", got=type(row).__name__, expected=_EXPECTED)
    for key in row:
        if key not in _KEYS:
            close = get_close_matches(key, _KEYS, n=1)
            remedy = f"Did you mean {close[0]}?" if close else None
            raise DataError(f"{where} has an unknown key {key!r}", expected=", ".join(_KEYS), remedy=remedy)
    if ("prompt" in row) == ("messages" in row):
        raise DataError(f"{where} needs one prompt", got=" and ".join(row) or "nothing", expected=_EXPECTED)
    prompt = row["prompt"] if "prompt" in row else row["messages"]
    if not _is_prompt(prompt, messages="messages" in row):
        raise DataError(f"{where} has a malformed prompt", expected=f"{_EXPECTED}, or a list of token ids")
    params, own = row.get("params"), row.get("id")
    if params is not None:
        if not isinstance(params, dict):
            raise DataError(f"{where} has malformed params", got=type(params).__name__, expected="an object")
        try:
            merged_params({}, params)
        except RequestError as error:
            raise _of(where, error) from error
    if own is not None and not _is_name(own):
        raise DataError(f"{where} has a malformed id", expected="a text of at most 255 characters, or an integer")
    priority = row.get("priority")
    return Item(
        prompt=prompt,
        name=None if own is None else str(own),
        params=params,
        rank=rank if priority is None else rank_of(priority, where=where),
    )


def _of(where: str, error: RequestError) -> DataError:
    return DataError(f"{where}: {error.what}", got=error.got, expected=error.expected, remedy=error.remedy)


def _is_prompt(value: Any, *, messages: bool) -> bool:
    """A prompt that is empty or too long for the model is the worker's to judge: it becomes an error row."""
    if messages:
        return isinstance(value, list) and bool(value) and all(map(_is_message, value))
    return isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value))


def _is_name(value: Any) -> bool:
    """A NUL is a character that PostgreSQL does not store."""
    good = isinstance(value, (str, int)) and not isinstance(value, bool)
    return good and len(str(value)) <= 255 and "\0" not in str(value)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
