"""Requests that go beyond what anybody foresaw: the client hears it in the form of every other error."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import faulty_engines
import httpx
import pytest
from serving_parts import BODY, service_over
from serving_process import BASE, ServingProcess

from burnish.serve.app import make_app
from burnish.serve.faults import Fault
from burnish.serve.parameters import completion_params
from burnish.serve.schema import CompletionRequest


def nested(depth: int) -> str:
    """A JSON schema of objects within objects."""
    return '{"type":"object","properties":{"a":' * depth + '{"type":"null"}' + "}}" * depth


def formatted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def test_an_error_nobody_foresaw_has_the_form_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_over(faulty_engines.plain)

    async def broken(*words: Any, **options: Any) -> Any:
        raise KeyError("secret")

    monkeypatch.setattr(service.prompting, "of_text", broken)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=make_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/v1/tokenize", json={"prompt": "a"})

    reply = asyncio.run(run())
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"
    assert "secret" not in reply.text


def test_a_schema_nested_without_end_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    request = CompletionRequest(model="m", prompt="p", response_format=formatted(deep))  # type: ignore[arg-type]
    with pytest.raises(Fault, match="nested too deeply") as caught:
        completion_params(request)
    assert caught.value.status == 400
    while deep:  # Python frees what is nested so deeply by recursion
        deep = deep.pop("a")


@pytest.mark.parametrize("depth", [100, 130, 300, 450, 480, 490, 495])
def test_schemas_of_any_depth_are_answered_or_refused(server: ServingProcess, depth: int) -> None:
    """From some depth on the engine's library refuses, then Python's recursion does, at several places."""
    whole = '{"model":"%s","prompt":"a","max_tokens":2,"response_format":%s}'
    schema = json.dumps(formatted("SCHEMA")).replace('"SCHEMA"', nested(depth))
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{server.url}/completions", content=whole % (BASE, schema), headers=headers, timeout=60)
    assert reply.status_code in (200, 400), reply.text
    assert reply.status_code == 400 or depth < 200


@pytest.mark.parametrize(
    "fields",
    [
        {"grammar": "start: " + "(" * 16_000 + '"a"' + ")" * 16_000},
        {"grammar": "start: " + "[" * 16_000 + '"a"' + "]" * 16_000},
        {"regex": "(" * 4_000 + "a" + ")" * 4_000},
    ],
    ids=["groups", "options", "regex"],
)
def test_notations_nested_without_end_do_not_reach_the_engine(server: ServingProcess, fields: dict[str, str]) -> None:
    before = server.metrics()["burnish_engine_restarts_total"]
    reply = server.post("/v1/completions", {**BODY, "max_tokens": 2, "ignore_eos": False, **fields})
    assert reply.status_code == 400, reply.text
    assert server.metrics()["burnish_engine_restarts_total"] == before
