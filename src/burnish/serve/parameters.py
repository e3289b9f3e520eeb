"""From a request's fields to the engine's sampling parameters."""

from __future__ import annotations

import json
from typing import Any

from burnish.engine.sampling import SamplingParams
from burnish.serve.faults import Fault
from burnish.serve.limits import MAX_SCHEMA_CHARS, MAX_TOKENS
from burnish.serve.schema import ChatRequest, CompletionRequest, JsonObject, JsonSchema, Sampling

_COMPLETION_TOKENS = 16
_ANY_OBJECT = '{"type": "object"}'


def completion_params(request: CompletionRequest) -> SamplingParams:
    """Raises RequestError or Fault where fields contradict each other."""
    asked = request.logprobs
    return _params(
        request,
        max_tokens=request.max_tokens or _COMPLETION_TOKENS,
        logprobs=asked,
        prompt_logprobs=asked if request.echo else None,
        response_format=request.response_format,
    )


def chat_params(request: ChatRequest) -> SamplingParams:
    """Raises RequestError or Fault where fields contradict each other."""
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        raise Fault(400, "max_tokens and max_completion_tokens differ", param="max_completion_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise Fault(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    return _params(
        request,
        max_tokens=request.max_tokens or request.max_completion_tokens or MAX_TOKENS,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=None,
        response_format=request.response_format,
    )


def _params(
    request: Sampling,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    response_format: Any,
) -> SamplingParams:
    if request.stream_options is not None and not request.stream:
        raise Fault(400, "stream_options needs stream to be true", param="stream_options")
    given: dict[str, Any] = {
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": _biases(request.logit_bias),
        "n": request.n,
        "stop": (request.stop,) if isinstance(request.stop, str) else request.stop,
        "stop_token_ids": request.stop_token_ids,
        "include_stop": request.include_stop_str_in_output,
        "ignore_eos": request.ignore_eos,
        "min_tokens": request.min_tokens,
        "regex": request.regex,
        "grammar": request.grammar,
        "json_schema": _schema(response_format),
    }
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        seed=request.seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        **{name: value for name, value in given.items() if value is not None},
    )


def _biases(biases: dict[str, float] | None) -> dict[int, float] | None:
    if biases is None:
        return None
    pairs = {int(key): value for key, value in biases.items()}
    if len(pairs) != len(biases):
        raise Fault(400, "logit_bias: a token id is there twice", param="logit_bias")
    return pairs


def _schema(response_format: Any) -> str | None:
    if isinstance(response_format, JsonObject):
        return _ANY_OBJECT
    if not isinstance(response_format, JsonSchema):
        return None
    param = "response_format.json_schema.schema"
    try:
        text = json.dumps(response_format.json_schema.schema_, ensure_ascii=False)
    except RecursionError:
        raise Fault(400, "the JSON schema is nested too deeply", param=param) from None
    if len(text) > MAX_SCHEMA_CHARS:
        raise Fault(
            400,
            f"the JSON schema is too long; got {len(text)} characters; expected at most {MAX_SCHEMA_CHARS}",
            param=param,
        )
    return text
