"""The two routes that produce text."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from burnish.engine.prompts import EncodedPrompt
from burnish.serve import replies
from burnish.serve.faults import Fault
from burnish.serve.jobs import Job
from burnish.serve.parameters import chat_params, completion_params
from burnish.serve.schema import ChatRequest, CompletionRequest, Sampling
from burnish.serve.service import ServedModel, Service

# No schema: readers of the document take one for that of the whole stream, others for that of each event.
_EVENTS: dict[str, Any] = {"text/event-stream": {}}
_ANSWERS = "The answers: one JSON document, or server-sent events where stream is true."


def generating(service: Service) -> APIRouter:
    """Routes for one service."""
    router = APIRouter()

    @router.post(
        "/v1/completions",
        response_class=Response,
        responses={200: {"model": replies.CompletionReply, "content": _EVENTS, "description": _ANSWERS}},
        summary="Continue texts.",
    )
    async def completions(request: CompletionRequest) -> Response:
        arrival_s = time.monotonic()
        model = service.served.find(request.model)
        params = completion_params(request)
        prompts = await service.prompting.of_completion(request)
        echo = [_text_of(service, prompt) for prompt in prompts] if request.echo else None
        return service.answer(_job("completion", model, request, prompts, params, arrival_s, echo=echo))

    @router.post(
        "/v1/chat/completions",
        response_class=Response,
        responses={200: {"model": replies.ChatReply, "content": _EVENTS, "description": _ANSWERS}},
        summary="Answer a conversation.",
    )
    async def chat(request: ChatRequest) -> Response:
        arrival_s = time.monotonic()
        model = service.served.find(request.model)
        params = chat_params(request)
        prompt = await service.prompting.of_chat(request)
        return service.answer(_job("chat", model, request, [prompt], params, arrival_s))

    return router


def _job(
    kind: str,
    model: ServedModel,
    request: Sampling,
    prompts: list[EncodedPrompt],
    params: Any,
    arrival_s: float,
    *,
    echo: list[str] | None = None,
) -> Job:
    options = request.stream_options
    return Job(
        kind=kind,
        model=model.name,
        adapter=model.adapter,
        fingerprint=f"fp_{model.fingerprint[:12]}",
        prompts=prompts,
        params=params,
        stream=bool(request.stream),
        echo=echo,
        include_usage=options is not None and options.include_usage,
        continuous_usage=options is not None and options.continuous_usage_stats,
        arrival_s=arrival_s,
    )


def _text_of(service: Service, prompt: EncodedPrompt) -> str:
    if prompt.text is not None:
        return prompt.text
    if max(prompt.ids) >= service.served.vocab_size:
        raise Fault(400, "prompt: a token is outside the vocabulary", param="prompt")
    if len(prompt.ids) > service.max_model_len:
        return ""  # the engine refuses it
    tokenizer = service.served.tokenizer
    return "" if tokenizer is None else tokenizer.decode(prompt.ids, skip_special_tokens=False)
