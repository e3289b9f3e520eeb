"""Errors name the field, in OpenAI's form, and never as anything but the status that fits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from burnish.errors import CheckpointError, DataError, MissingExtraError, RequestError, WorkerError
from burnish.serve.admission import Busy
from burnish.serve.faults import Fault, fault_of, fault_of_validation
from burnish.serve.schema import ChatRequest, CompletionRequest

MESSAGE = {"role": "user", "content": "x"}


def fault(kind: type[BaseModel], **fields: Any) -> Fault:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(fields)
    return fault_of_validation(caught.value.errors())


@pytest.mark.parametrize("name", ["best_of", "suffix", "user", "guided_json", "__class__"])
def test_an_unknown_field_is_named(name: str) -> None:
    found = fault(CompletionRequest, model="m", prompt="p", **{name: 1})
    assert (found.status, found.param, found.code) == (400, name, "unknown_field")
    assert name in found.message


@pytest.mark.parametrize("name", ["tools", "tool_choice", "functions"])
def test_tools_are_refused_as_what_they_are(name: str) -> None:
    found = fault(ChatRequest, model="m", messages=[MESSAGE], **{name: []})
    assert found.param == name
    assert "does not call tools" in found.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    found = fault(ChatRequest, **{"model": "m", "messages": [MESSAGE], **fields})
    assert found.status == 400
    assert found.param is not None
    assert found.param.startswith(param)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Field required"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema", "F"),
        (
            {"messages": [MESSAGE, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.1.content.0",
            "parts of a message are text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}]},
            "messages.0.content.0.cache",
            "not a field",
        ),
    ],
)
def test_a_place_within_a_field_is_named_once(fields: dict[str, Any], param: str, words: str) -> None:
    found = fault(ChatRequest, **{"model": "m", "messages": [MESSAGE], **fields})
    assert found.param == param
    assert words in found.message


@pytest.mark.parametrize(
    ("kind", "content_type", "words"),
    [
        ("missing", "application/json", "the body is empty"),
        ("model_attributes_type", "application/json; charset=utf-8", "the body is no JSON object"),
        ("model_attributes_type", None, "got no such header; expected Content-Type: application/json"),
        ("model_attributes_type", "text/plain", "got text/plain; expected Content-Type: application/json"),
    ],
)
def test_a_body_at_fault_as_a_whole_is_told_so(kind: str, content_type: str | None, words: str) -> None:
    errors = [{"type": kind, "loc": ("body",), "msg": "Input should be a valid dictionary"}]
    found = fault_of_validation(errors, content_type=content_type)
    assert found.status == 400
    assert words in found.message


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (RequestError("no"), 400, {}),
        (DataError("no"), 400, {}),
        (MissingExtraError("no"), 400, {}),
        (WorkerError("no"), 503, {"Retry-After": "2"}),
        (CheckpointError("no"), 503, {"Retry-After": "2"}),
        (Busy("full", "no", 7), 429, {"Retry-After": "7"}),
        (Busy("draining", "no", 9), 503, {"Retry-After": "9"}),
        (KeyError("secret"), 500, {}),
    ],
)
def test_errors_become_the_status_that_fits(error: Exception, status: int, headers: dict[str, str]) -> None:
    found = fault_of(error)
    assert (found.status, found.headers) == (status, headers)
    record = json.loads(found.body())["error"]
    assert set(record) == {"message", "type", "param", "code"}
    assert "secret" not in record["message"]
