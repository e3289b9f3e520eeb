"""The application: routes behind the guard, errors in one form."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from burnish.errors import BurnishError
from burnish.serve.admission import Busy
from burnish.serve.faults import Fault, fault_of, fault_of_validation
from burnish.serve.guard import Guard
from burnish.serve.openapi import describe
from burnish.serve.routes_generate import generating
from burnish.serve.routes_other import telling
from burnish.serve.service import Service


def make_app(service: Service) -> FastAPI:
    """An ASGI application over a service, which it opens when it starts and closes when it ends.

    Whoever mounts it runs it in one event loop and one process; the engine has a process of its own.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.open()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="burnish",
        version=version("burnish"),
        description="OpenAI's HTTP API over burnish's engine.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.include_router(generating(service))
    app.include_router(telling(service))
    app.openapi = describe(app, service)  # type: ignore[method-assign]

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return _reply(fault_of_validation(error.errors(), content_type=request.headers.get("content-type")))

    @app.exception_handler(HTTPException)
    async def from_framework(request: Request, error: HTTPException) -> Response:
        messages = {404: "there is no such route", 405: "this route has other methods"}
        message = messages.get(error.status_code, str(error.detail))
        return _reply(Fault(error.status_code, message, headers=error.headers))

    async def known(request: Request, error: Exception) -> Response:
        return _reply(fault_of(error))

    # Of what nobody foresaw the client hears the kind alone, in the same form; the log gets the traceback.
    for kind in (Fault, Busy, BurnishError, Exception):
        app.add_exception_handler(kind, known)
    settings = service.settings
    app.add_middleware(
        Guard,
        keys=service.keys,
        max_body_bytes=settings.max_body_bytes,
        upload_timeout_s=settings.upload_timeout_s,
        on_refused=lambda reason: service.metrics.rejections.labels(reason).inc(),
        check_room=service.check_room,
    )
    return app


def _reply(fault: Fault) -> Response:
    return Response(fault.body(), fault.status, headers=fault.headers, media_type="application/json")
