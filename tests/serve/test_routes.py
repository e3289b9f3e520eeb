"""Every route over HTTP: what it tells, and what it refuses."""

from __future__ import annotations

import json

import httpx
import pytest
from serving_process import BASE, ServingProcess

from burnish.data.bundled import bundled_path
from burnish.data.tokenizer import Tokenizer


def test_models_are_listed_with_their_fingerprints(server: ServingProcess) -> None:
    [card] = server.get("/v1/models").json()["data"]
    assert card["id"] == BASE
    assert len(card["fingerprint"]) == 64
    assert card["max_model_len"] == 1024
    assert server.get(f"/v1/models/{BASE}").json() == card
    reply = server.get("/v1/models/none")
    assert reply.status_code == 404
    assert BASE in reply.json()["error"]["message"]


def test_tokenize_gives_what_a_completion_is_computed_from(server: ServingProcess) -> None:
    tokenizer = Tokenizer.load(bundled_path(BASE))
    text = "SELECT naïve 東京 🙂"
    record = server.post("/v1/tokenize", {"prompt": text}).json()
    assert record == {"tokens": tokenizer.encode_prompt(text), "count": len(record["tokens"]), "max_model_len": 1024}
    assert server.post("/v1/detokenize", {"tokens": record["tokens"]}).json() == {"prompt": text}
    assert server.complete(prompt=text, max_tokens=1)["usage"]["prompt_tokens"] == record["count"]
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    chat = server.post("/v1/tokenize", {"messages": messages}).json()
    assert chat["tokens"] == tokenizer.encode_chat([{"role": "user", "content": "ab"}])
    assert server.chat(messages=messages, max_tokens=1)["usage"]["prompt_tokens"] == chat["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/tokenize", {}, "prompt"),
        ("/v1/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/v1/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/v1/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/v1/completions", {"model": BASE, "prompt": "a", "stream_options": {}}, "stream_options"),
        ("/v1/completions", {"model": BASE, "prompt": []}, "prompt"),
        ("/v1/completions", {"model": BASE, "prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": "a"}, "model"),
        ("/v1/chat/completions", {"model": BASE, "messages": [{"role": "user", "content": "a"}], "tools": []}, "tools"),
    ],
)
def test_requests_at_fault_get_400_with_the_field(
    server: ServingProcess, path: str, body: dict[str, object], param: str
) -> None:
    reply = server.post(path, body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "word " * 2000}, "too long for the model"),
        ({"prompt": [5, 10**6]}, "outside the vocabulary"),
        ({"prompt": ""}, "prompt"),
        ({"stop_token_ids": [10**6]}, "outside the vocabulary"),
        ({"logit_bias": {"9999999": 1}}, "outside the vocabulary"),
        ({"min_tokens": 9, "max_tokens": 2}, "min_tokens"),
        ({"regex": "("}, "regular expression"),
        ({"grammar": "start: nothing"}, "grammar"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "one constraint only"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}}, "JSON schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "x" * 40000}}}}, "too long"),
        ({"n": 16, "prompt": ["a"] * 20}, "too many answers"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_cannot_do_is_a_400_before_anything_is_streamed(
    server: ServingProcess, fields: dict[str, object], words: str, stream: bool
) -> None:
    reply = server.post("/v1/completions", {"model": BASE, "prompt": "a", "stream": stream, **fields})
    assert reply.status_code == 400, reply.text
    assert words in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b"[" * 100_000,
        b"1" * 10_000,
        b'{"model":"\\ud800"}',
    ],
)
def test_bodies_that_are_no_request_get_400(server: ServingProcess, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{server.url}/completions", content=content, headers=headers, timeout=60)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/x-www-form-urlencoded"}])
def test_a_body_that_is_not_declared_as_json_names_the_header(server: ServingProcess, headers: dict[str, str]) -> None:
    content = json.dumps({"model": BASE, "prompt": "a", "max_tokens": 1})
    reply = httpx.post(f"{server.url}/completions", content=content, headers=headers, timeout=60)
    assert reply.status_code == 400, reply.text
    assert "expected Content-Type: application/json" in reply.json()["error"]["message"]


def test_a_developer_is_who_the_system_is(server: ServingProcess) -> None:
    question = {"role": "user", "content": "How many?"}
    replies = [
        server.post("/v1/tokenize", {"messages": [{"role": role, "content": "Be brief."}, question]}).json()
        for role in ("developer", "system")
    ]
    assert replies[0] == replies[1]


def test_large_bodies_are_cut_off_declared_or_not(server: ServingProcess) -> None:
    large = json.dumps({"model": BASE, "prompt": "x" * (5 << 20)}).encode()
    headers = {"content-type": "application/json"}
    for content in (large, (large[start : start + 65536] for start in range(0, len(large), 65536))):
        try:
            reply = httpx.post(f"{server.url}/completions", content=content, headers=headers, timeout=60)
        except httpx.WriteError:
            continue  # the server had answered and closed before all of it was sent
        assert reply.status_code == 413


def test_wrong_methods_and_paths_are_told_apart(server: ServingProcess) -> None:
    reply = server.get("/v1/completions")
    assert reply.status_code == 405
    assert reply.headers["allow"] == "POST"
    for path in ("/", "/docs", "/v1", "/v1/embeddings"):
        assert server.get(path).status_code == 404
        assert server.get(path).json()["error"]["message"] == "there is no such route"


def test_no_other_origin_is_let_in(server: ServingProcess) -> None:
    reply = server.get("/v1/models", headers={"Origin": "https://elsewhere.example"})
    assert not [name for name in reply.headers if name.startswith("access-control")]
    assert httpx.options(f"{server.url}/models", headers={"Origin": "https://elsewhere.example"}).status_code == 405


def test_metrics_tell_what_happened(server: ServingProcess) -> None:
    before = server.metrics()
    server.complete(max_tokens=5, ignore_eos=True, n=2)
    after = server.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    model = f'model="{BASE}"'
    assert grown(f"burnish_output_tokens_total{{{model}}}") == 10
    assert grown(f"burnish_prompt_tokens_total{{{model}}}") == 2
    assert grown(f"burnish_time_to_first_token_seconds_count{{{model}}}") == 1
    assert grown(f"burnish_time_per_output_token_seconds_count{{{model}}}") == 2
    assert grown(f'burnish_requests_total{{kind="completion",{model},outcome="ok"}}') == 1
    assert after["burnish_engine_up"] == 1
    assert after["burnish_kv_blocks"] > 0
    for name in ("burnish_queued_answers", "burnish_running_answers", "burnish_preemptions_total"):
        assert name in after


def test_the_document_declares_what_is_answered(server: ServingProcess) -> None:
    document = server.get("/openapi.json").json()
    operation = document["paths"]["/v1/completions"]["post"]
    assert set(operation["responses"]) == {"200", "400", "404", "408", "413", "429", "503"}
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == [BASE]
    assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    assert operation["responses"]["200"]["content"]["text/event-stream"] == {}
