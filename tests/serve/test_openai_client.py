"""OpenAI's own client, unchanged: plain, asynchronous, streaming, structured, scored, refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from serving_process import BASE, ServingProcess

openai: Any = pytest.importorskip("openai", reason="the extra dev brings it")
from pydantic import BaseModel  # noqa: E402

MESSAGES = [{"role": "user", "content": "How many rows are there?"}]


@pytest.fixture
def client(server: ServingProcess) -> Any:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=120) as opened:
        yield opened


def test_models_and_completions(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [BASE]
    assert client.models.retrieve(BASE).owned_by == "burnish"
    reply = client.completions.create(model=BASE, prompt="CREATE TABLE", max_tokens=5, temperature=0, logprobs=1)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 5
    assert len(reply.choices[0].logprobs.tokens) == 5


def test_chat_whole_and_streamed_agree(client: Any) -> None:
    options = {"model": BASE, "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.choices[0].message.role == "assistant"
    assert whole.system_fingerprint.startswith("fp_")


def test_async_streams_run_beside_each_other(server: ServingProcess) -> None:
    async def one(opened: Any, seed: int) -> str:
        options = {"model": BASE, "messages": MESSAGES, "max_tokens": 16, "temperature": 1.2, "seed": seed}
        stream = await opened.chat.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", timeout=120) as opened:
            return await asyncio.gather(*(one(opened, seed) for seed in (1, 2, 3, 1)))

    texts = asyncio.run(several())
    assert texts[0] == texts[3]
    assert len(set(texts)) == 3


class Answer(BaseModel):
    table: str
    rows: int


def test_structured_output_is_parsed(client: Any) -> None:
    # A model that never saw JSON writes long white space and endless numbers; both are bounded.
    schema = Answer.model_json_schema() | {"additionalProperties": False}
    schema["properties"]["table"] |= {"maxLength": 8}
    schema["properties"]["rows"] |= {"minimum": 0, "maximum": 99}
    reply = client.chat.completions.create(
        model=BASE,
        messages=MESSAGES,
        max_tokens=600,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
    )
    assert set(json.loads(reply.choices[0].message.content)) == {"table", "rows"}

    class Word(BaseModel):
        yes: bool

    parsed = client.chat.completions.parse(
        model=BASE, messages=MESSAGES, max_tokens=600, temperature=0, response_format=Word
    )
    assert parsed.choices[0].message.parsed.yes in (True, False)


def test_logprobs_of_the_chat(client: Any) -> None:
    reply = client.chat.completions.create(
        model=BASE, messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    for token in reply.choices[0].logprobs.content:
        assert token.logprob <= 0
        assert token.top_logprobs[0].token == token.token


def test_refusals_are_the_clients_own_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="none", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="does not call tools"):
        client.chat.completions.create(
            model=BASE,
            messages=MESSAGES,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=BASE, messages=MESSAGES, user="me")
    assert refused.value.body["param"] == "user"
