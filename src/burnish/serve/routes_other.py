"""The routes that tell about the server and its models."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from burnish.serve import replies
from burnish.serve.faults import Fault
from burnish.serve.metrics import CONTENT_TYPE
from burnish.serve.schema import DetokenizeRequest, FeedbackRequest, TokenizeRequest
from burnish.serve.service import ServedModel, Service

# Longer lists are decoded beside the event loop, so that the streams go on.
_INLINE_TOKENS = 4096


def telling(service: Service) -> APIRouter:
    """Routes for one service."""
    router = APIRouter()

    def card(model: ServedModel) -> dict[str, object]:
        return {
            "id": model.name,
            "object": "model",
            "created": service.started_s,
            "owned_by": "burnish",
            "root": model.root,
            "parent": model.parent,
            "fingerprint": model.fingerprint,
            "max_model_len": service.max_model_len,
        }

    @router.get("/v1/models", responses={200: {"model": replies.ModelList}}, summary="The models, adapters included.")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card(model) for model in service.served.models]})

    @router.get("/v1/models/{model:path}", responses={200: {"model": replies.ModelCard}}, summary="One model.")
    async def model(model: str) -> Response:
        return JSONResponse(card(service.served.find(model)))

    @router.post("/v1/tokenize", responses={200: {"model": replies.TokenizeReply}}, summary="Text to token ids.")
    async def tokenize(request: TokenizeRequest) -> Response:
        if request.model is not None:
            service.served.find(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise Fault(400, "tokenize needs either prompt or messages", param="prompt")
        if request.prompt is not None:
            if request.add_generation_prompt is not None:
                raise Fault(400, "add_generation_prompt is for messages", param="add_generation_prompt")
            special = request.add_special_tokens is not False
            encoded = await service.prompting.of_text(request.prompt, add_special_tokens=special)
        else:
            if request.add_special_tokens is not None:
                raise Fault(400, "add_special_tokens is for prompt", param="add_special_tokens")
            encoded = await service.prompting.of_messages(
                request.messages or [], add_generation_prompt=request.add_generation_prompt is not False
            )
        ids = list(encoded.ids)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.max_model_len})

    @router.post("/v1/detokenize", responses={200: {"model": replies.DetokenizeReply}}, summary="Token ids to text.")
    async def detokenize(request: DetokenizeRequest) -> Response:
        if request.model is not None:
            service.served.find(request.model)
        tokenizer = service.served.tokenizer
        if tokenizer is None:
            raise Fault(400, "this model has no tokenizer")
        if request.tokens and max(request.tokens) >= service.served.vocab_size:
            raise Fault(400, "tokens: one is outside the vocabulary", param="tokens")
        skip = bool(request.skip_special_tokens)
        ids = request.tokens
        if len(ids) <= _INLINE_TOKENS:
            text = tokenizer.decode(ids, skip_special_tokens=skip)
        else:
            text = await asyncio.to_thread(tokenizer.decode, ids, skip_special_tokens=skip)
        return JSONResponse({"prompt": text})

    @router.post(
        "/v1/feedback", responses={200: {"model": replies.FeedbackReply}}, summary="An answer was right or not."
    )
    async def feedback(request: FeedbackRequest) -> Response:
        if (request.correct is None) == (request.expected is None):
            raise Fault(400, "feedback needs either correct or expected", param="correct")
        index = request.index or 0
        label = service.metrics.feedback.label(request.id, index, correct=request.correct, expected=request.expected)
        return JSONResponse({"id": request.id, "index": index, **asdict(label)})

    @router.get(
        "/health",
        responses={200: {"model": replies.Health}, 503: {"model": replies.Health}},
        summary="The server runs, or recovers by itself. No key needed.",
    )
    async def health() -> Response:
        broken = service.engine.state == "broken"
        record = {"status": "broken" if broken else "ok", "engine": service.engine.state}
        return JSONResponse(record, status_code=503 if broken else 200)

    @router.get(
        "/ready",
        responses={200: {"model": replies.Health}, 503: {"model": replies.Health}},
        summary="Requests are taken. No key needed.",
    )
    async def ready() -> Response:
        good, why = service.readiness()
        record = {"status": "ready" if good else why, "engine": service.engine.state}
        return JSONResponse(record, status_code=200 if good else 503)

    @router.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        response_class=Response,
        summary="For Prometheus.",
    )
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    return router
