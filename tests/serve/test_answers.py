"""Answers are the engine's own: every field has its effect, and what is reported about them is true."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from serving_process import BASE, ServingProcess, events_of

from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams

PROMPT = "CREATE TABLE orders ("
MESSAGES = [{"role": "user", "content": "How many rows are there?"}]


@pytest.fixture(scope="module")
def engine() -> NativeEngine:
    return NativeEngine(BASE, threads=1)


def streamed(server: ServingProcess, path: str, **fields: Any) -> tuple[list[str], list[Any]]:
    """The texts of a stream's answers, and its events."""
    reply = server.post(path, {"model": BASE, "temperature": 0, "stream": True, **fields})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, done = events_of(reply.text)
    assert done == "[DONE]"
    texts: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            piece = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return [texts[index] for index in sorted(texts)], events


def test_answers_equal_the_engines_whole_and_streamed(server: ServingProcess, engine: NativeEngine) -> None:
    [expected] = engine.generate([PROMPT], SamplingParams(max_tokens=40))
    whole = server.complete(prompt=PROMPT, max_tokens=40)
    [choice] = whole["choices"]
    assert choice["text"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason
    assert whole["usage"]["completion_tokens"] == len(expected.token_ids)
    assert streamed(server, "/v1/completions", prompt=PROMPT, max_tokens=40)[0] == [expected.text]

    [expected] = engine.generate([MESSAGES], SamplingParams(max_tokens=40))
    assert server.chat(messages=MESSAGES, max_tokens=40)["choices"][0]["message"]["content"] == expected.text
    assert streamed(server, "/v1/chat/completions", messages=MESSAGES, max_tokens=40)[0] == [expected.text]


def test_prompts_may_be_ids_and_lists_and_keep_their_order(server: ServingProcess, engine: NativeEngine) -> None:
    texts = ["CREATE TABLE", "SELECT", "-- list"]
    params = SamplingParams(max_tokens=8)
    expected = [output.text for output in engine.generate(texts, params)]
    several = server.complete(prompt=texts, max_tokens=8)
    assert [choice["text"] for choice in several["choices"]] == expected
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    ids = [server.post("/v1/tokenize", {"prompt": text}).json()["tokens"] for text in texts]
    assert [choice["text"] for choice in server.complete(prompt=ids, max_tokens=8)["choices"]] == expected
    assert several["usage"]["prompt_tokens"] == sum(len(one) for one in ids)
    assert streamed(server, "/v1/completions", prompt=ids, max_tokens=8)[0] == expected


def test_the_same_seed_gives_the_same_answers_streamed_or_not(server: ServingProcess, engine: NativeEngine) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.5, "seed": 11, "n": 3}
    first = [choice["text"] for choice in server.complete(**fields)["choices"]]
    assert len(set(first)) == 3
    assert streamed(server, "/v1/completions", **fields)[0] == first
    [output] = engine.generate([PROMPT], SamplingParams(max_tokens=12, temperature=1.5, seed=11, n=3))
    assert [choice.text for choice in output.choices] == first
    assert [choice["text"] for choice in server.complete(**{**fields, "seed": 12})["choices"]] != first


def test_finish_reason_and_usage_are_true(server: ServingProcess) -> None:
    cut = server.complete(prompt=PROMPT, max_tokens=7, ignore_eos=True)
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    stopped = server.complete(prompt=PROMPT, max_tokens=40, stop=[","])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert "," not in stopped["choices"][0]["text"]
    assert stopped["usage"]["completion_tokens"] < 40
    kept = server.complete(prompt=PROMPT, max_tokens=40, stop=",", include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == stopped["choices"][0]["text"] + ","
    at_end = server.complete(prompt="x " * 500, max_tokens=1000, ignore_eos=True)
    assert at_end["choices"][0]["finish_reason"] == "length"
    assert at_end["usage"]["total_tokens"] == 1024


def test_a_stream_tells_its_usage_at_the_end_or_all_along(server: ServingProcess) -> None:
    fields = {"messages": MESSAGES, "max_tokens": 9, "ignore_eos": True}
    _, events = streamed(server, "/v1/chat/completions", **fields, stream_options={"include_usage": True})
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 9
    _, events = streamed(server, "/v1/chat/completions", **fields, stream_options={"continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 9
    _, events = streamed(server, "/v1/chat/completions", **fields)
    assert all("usage" not in event for event in events)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_sampling_fields_have_their_effect(server: ServingProcess) -> None:
    plain = server.complete(prompt=PROMPT, max_tokens=12)["choices"][0]["text"]
    [first] = server.post("/v1/tokenize", {"prompt": plain[:3], "add_special_tokens": False}).json()["tokens"][:1]
    unlike = [
        {"logit_bias": {str(first): -100}},
        {"frequency_penalty": 2.0, "max_tokens": 60},
        {"presence_penalty": 2.0, "max_tokens": 60},
        {"repetition_penalty": 5.0, "max_tokens": 60},
    ]
    for fields in unlike:
        longer = server.complete(prompt=PROMPT, max_tokens=fields.get("max_tokens", 12))["choices"][0]["text"]
        assert server.complete(prompt=PROMPT, **{"max_tokens": 12, **fields})["choices"][0]["text"] != longer, fields
    assert (
        server.complete(prompt=PROMPT, max_tokens=12, temperature=1e-300, top_p=5e-324)["choices"][0]["text"] == plain
    )
    for fields in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        found = server.complete(prompt=PROMPT, max_tokens=12, **{**fields, "temperature": 2.0})
        assert found["choices"][0]["text"] == plain, fields
    assert server.complete(prompt=PROMPT, max_tokens=6, stop_token_ids=[first])["usage"]["completion_tokens"] == 1
    long = server.complete(prompt=PROMPT, max_tokens=6, min_tokens=5, stop_token_ids=[first])
    assert long["usage"]["completion_tokens"] >= 5


def test_answers_follow_schemas_and_expressions(server: ServingProcess) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    formatted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    answer = server.chat(messages=MESSAGES, max_tokens=600, response_format=formatted)
    assert json.loads(answer["choices"][0]["message"]["content"])["a"] in ("x", "y")
    assert answer["choices"][0]["finish_reason"] == "stop"
    anything = server.complete(
        prompt="{", max_tokens=200, response_format={"type": "json_object"}, temperature=0.5, seed=1
    )
    text = anything["choices"][0]["text"].strip()
    assert text.startswith("{")
    assert re.fullmatch("[ab]{3}", server.complete(regex="[ab]{3}", max_tokens=9)["choices"][0]["text"])
    grammar = 'start: "one" | "two"'
    assert server.complete(grammar=grammar, max_tokens=9)["choices"][0]["text"] in ("one", "two")
    plain = {"type": "text"}
    assert server.complete(response_format=plain, max_tokens=5)["choices"] == server.complete(max_tokens=5)["choices"]


def test_logprobs_are_the_engines(server: ServingProcess, engine: NativeEngine) -> None:
    [expected] = engine.generate([PROMPT], SamplingParams(max_tokens=6, logprobs=2, prompt_logprobs=2, ignore_eos=True))
    fields = {"prompt": PROMPT, "max_tokens": 6, "logprobs": 2, "echo": True, "ignore_eos": True}
    [choice] = server.complete(**fields)["choices"]
    scored = choice["logprobs"]
    assert expected.prompt_logprobs is not None
    assert expected.logprobs is not None
    numbers = [one and one.logprob for one in (*expected.prompt_logprobs, *expected.logprobs)]
    assert scored["token_logprobs"] == pytest.approx(numbers, abs=1e-4)
    assert choice["text"] == PROMPT + expected.text == "".join(scored["tokens"])
    assert [choice["text"][start:] for start in scored["text_offset"]] == [
        "".join(scored["tokens"][place:]) for place in range(len(scored["tokens"]))
    ]
    assert scored["top_logprobs"][0] is None
    assert all(len(top) == 2 for top in scored["top_logprobs"][1:])

    [text], events = streamed(server, "/v1/completions", **fields)
    assert text == choice["text"]
    tokens = [token for event in events for token in (event["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
    offsets = [
        one for event in events for one in (event["choices"][0]["logprobs"] or {"text_offset": []})["text_offset"]
    ]
    assert (tokens, offsets) == (scored["tokens"], scored["text_offset"])

    content = server.chat(messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"][
        "content"
    ]
    assert len(content) == 4
    for one in content:
        assert len(one["top_logprobs"]) == 3
        assert one["logprob"] == pytest.approx(one["top_logprobs"][0]["logprob"], abs=1e-6)
        assert bytes(one["bytes"]).decode() == one["token"]


def test_scored_prompts_come_first_in_every_answer_of_a_stream(server: ServingProcess) -> None:
    fields = {"prompt": [PROMPT, "SELECT"], "max_tokens": 5, "logprobs": 0, "echo": True, "n": 2, "seed": 3}
    whole = server.complete(**fields, temperature=1.0)["choices"]
    texts, _ = streamed(server, "/v1/completions", **{**fields, "temperature": 1.0})
    assert texts == [choice["text"] for choice in whole]
    assert [text.startswith(prompt) for text, prompt in zip(texts, [PROMPT, PROMPT, "SELECT", "SELECT"])] == [True] * 4
