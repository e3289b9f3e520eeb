"""Errors as OpenAI's clients expect them: a status, and one object that says what, of which kind, and where."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from burnish.errors import BurnishError, DataError, MissingExtraError, RequestError
from burnish.serve.admission import Busy

_KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_TOOLS = frozenset(("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"))
_MAX_CHARS = 600
_JSON = "application/json"


class Fault(Exception):
    """An error on its way to a client.

    Attributes:
        param: the field at fault.
        headers: beyond those of any JSON answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _MAX_CHARS else f"{message[:_MAX_CHARS]}..."
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON document."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        record = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": record}).encode()


def fault_of(error: BaseException) -> Fault:
    """The fault that an error of ours becomes."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, Busy):
        status = 429 if error.reason == "full" else 503
        return Fault(status, error.message, code=error.reason, headers={"Retry-After": str(error.retry_after_s)})
    if isinstance(error, (RequestError, DataError)):
        code = "context_length_exceeded" if "too long for the model" in error.message else None
        return Fault(400, error.message, code=code)
    if isinstance(error, MissingExtraError):
        return Fault(400, f"this server cannot do that: {error.message}")
    if isinstance(error, BurnishError):
        return Fault(503, error.message, code="engine_failed", headers={"Retry-After": "2"})
    return Fault(500, f"an unexpected error: {type(error).__name__}")


def fault_of_validation(errors: Sequence[Mapping[str, Any]], *, content_type: str | None = _JSON) -> Fault:
    """A 400 that names the field that is wrong.

    Args:
        errors: pydantic's list. An unknown field counts first. Where a field may be of several kinds, there is an error
            for each of them, and the one that fits one of the kinds best says most.
        content_type: what the request says its body is.
    """
    if not errors:
        return Fault(400, "the request is not valid")
    if tuple(errors[0].get("loc", ())) == ("body",):
        return _fault_of_body(str(errors[0].get("type")), content_type)
    unknown = [error for error in errors if error.get("type") == "extra_forbidden"]
    error = unknown[0] if unknown else max(errors, key=_telling)
    path = _path(error.get("loc", ()))
    other = next((each for each in errors if _is_other_part(each)), None)
    if other is not None:
        path = _path(other["loc"][:-1])
        return Fault(400, f"{path}: parts of a message are text; this model reads nothing else", param=path)
    if unknown:
        if path in _TOOLS:
            return Fault(400, f"{path}: this server does not call tools", param=path, code="unsupported")
        return Fault(400, f"{path} is not a field that this server knows", param=path, code="unknown_field")
    if error.get("type") == "json_invalid":
        return Fault(400, "the body is not JSON", code="invalid_json")
    where = f"{path}: " if path else ""
    return Fault(400, f"{where}{error.get('msg', 'not valid')}", param=path or None)


def _fault_of_body(kind: str, content_type: str | None) -> Fault:
    """The body as a whole is at fault."""
    if kind == "missing":
        return Fault(400, "the body is empty; expected a JSON object")
    declared = (content_type or "").partition(";")[0].strip().lower()
    if declared == _JSON or declared.endswith("+json"):
        return Fault(400, "the body is no JSON object")
    # Read all the same, any page that a browser shows could ask a server on its machine: such texts are sent unasked.
    got = declared[:80] or "no such header"
    return Fault(400, f"the body is not declared as JSON; got {got}; expected Content-Type: {_JSON}", code="not_json")


def _is_other_part(error: Mapping[str, Any]) -> bool:
    """A part of a message's content that is no text, such as an image."""
    loc = tuple(error.get("loc", ()))
    return "messages" in loc and "content" in loc and loc[-1] == "type" and error.get("type") == "literal_error"


def _telling(error: Mapping[str, Any]) -> tuple[bool, int]:
    return not str(error.get("type", "")).endswith("_type"), len(error.get("loc", ()))


def _path(loc: Sequence[Any]) -> str:
    """`messages.0.content` from pydantic's way of telling a place, without the names of its alternatives."""
    parts = [str(part) for part in loc if part != "body"]
    plain = [part for part in parts if not any(sign in part for sign in "[](),-") and part.lower() == part]
    drop = {"str", "list", "int", "float", "bool", "text", "json_object", "json_schema"}
    kept = [
        part
        for place, part in enumerate(plain)
        if place == 0 or part not in drop or (part == "json_schema" and plain[place - 1] != "response_format")
    ]
    return ".".join(kept)[:200]
