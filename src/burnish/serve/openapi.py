"""The OpenAPI document, with every status that a route may answer and what this server's model allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from burnish.serve import replies
from burnish.serve.guard import GENERATING_PATHS, OPEN_PATHS
from burnish.serve.service import Service

_TEXT = {
    400: "A field is wrong or unknown; it is named.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body took too long to arrive.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to try again.",
    503: "The engine is not ready, or the server is shutting down; Retry-After says when to try again.",
}
_RETRY = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds.", "required": True}}


def describe(app: FastAPI, service: Service) -> Callable[[], dict[str, Any]]:
    """A function that gives the document, made once."""
    made: dict[str, Any] = {}

    def document() -> dict[str, Any]:
        if not made:
            made.update(_document(app, service))
        return made

    return document


def _document(app: FastAPI, service: Service) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes, description=app.description)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    template = "#/components/schemas/{model}"
    reply = replies.ErrorReply.model_json_schema(ref_template=template)
    schemas.update(reply.pop("$defs", {}))
    schemas["ErrorReply"] = reply
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _complete(operation, path, takes_body=method == "post", keyed=service.keys is not None)
    names = [model.name for model in service.served.models]
    for name in ("CompletionRequest", "ChatRequest"):
        schemas[name]["properties"]["model"]["enum"] = names
    _bound_ids(schemas, most=service.served.vocab_size - 1)
    if service.keys is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _complete(operation: dict[str, Any], path: str, *, takes_body: bool, keyed: bool) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    statuses = []
    if takes_body:
        statuses += [400, 404, 408, 413]
    if "{model}" in path:
        statuses.append(404)
    if path in GENERATING_PATHS:
        statuses += [429, 503]
    elif takes_body:
        statuses.append(503)
    if keyed and path not in OPEN_PATHS:
        statuses.append(401)
        operation["security"] = [{"key": []}]
    for status in statuses:
        responses[str(status)] = {
            "description": _TEXT[status],
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}},
            **({"headers": _RETRY} if status in (429, 503) else {}),
        }


def _bound_ids(part: Any, *, most: int) -> None:
    """Token ids end where this model's vocabulary ends."""
    if isinstance(part, dict):
        for name, value in part.get("properties", {}).items():
            if name in ("prompt", "tokens", "stop_token_ids"):
                _bound_items(value, most=most)
        for value in part.values():
            _bound_ids(value, most=most)
    elif isinstance(part, list):
        for value in part:
            _bound_ids(value, most=most)


def _bound_items(part: Any, *, most: int) -> None:
    if isinstance(part, dict):
        items = part.get("items")
        if isinstance(items, dict) and items.get("type") == "integer":
            items["maximum"] = most
        for value in part.values():
            _bound_items(value, most=most)
    elif isinstance(part, list):
        for value in part:
            _bound_items(value, most=most)
