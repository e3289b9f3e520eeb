"""What stands before the replicas on Ray: it knows all of them, and answers what concerns them together.

Every replica tells it twice a second how it is doing, and hears whether the server is ending. It answers /health,
/ready, /metrics and /openapi.json; requests for answers do not pass through it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from burnish.serve.faults import Fault
from burnish.serve.guard import Guard
from burnish.serve.keys import KeyRing
from burnish.serve.metrics import CONTENT_TYPE

Phase = Literal["serve", "drain", "cut"]
BEAT_S = 0.5
_FORGOTTEN_S = 15.0
_BODY_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a replica says of itself.

    Attributes:
        state: of its engine.
        phase: the last that it heard of, and acts on.
        held: answers let in and not ended.
        metrics: its page for Prometheus; None where it did not change this time.
        openapi: said when it begins, and now and then.
    """

    replica: str
    state: str
    phase: Phase
    held: int
    metrics: str | None = None
    openapi: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why no replica could make its engine; see `messages.Refused`."""

    kind: str
    message: str


@dataclass(frozen=True, kw_only=True)
class FrontState:
    """All replicas in short: those that take requests, those that know that the server is ending, answers let in."""

    ready: int
    ending: int
    known: int
    held: int
    refusal: Refusal | None


class Desk:
    """The front's memory and its ASGI application.

    Args:
        wanted: replicas there ought to be.
        keys: see `Guard`.
    """

    def __init__(self, *, wanted: int, keys: KeyRing | None) -> None:
        self._wanted = wanted
        self._keys = keys
        self._app: ASGIApp | None = None
        self._beats: dict[str, tuple[Beat, float]] = {}
        self._metrics: dict[str, str] = {}
        self._openapi: dict[str, Any] | None = None
        self.phase: Phase = "serve"
        self.refusal: Refusal | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:  # made where it is called, as it cannot be pickled
            self._app = self._made()
        await self._app(scope, receive, send)

    def take(self, beat: Beat) -> Phase:
        """Note how a replica is doing; returns what it is to do."""
        now_s = time.monotonic()
        self._beats[beat.replica] = (beat, now_s)
        if beat.metrics is not None:
            self._metrics[beat.replica] = beat.metrics
        if beat.openapi is not None:
            self._openapi = beat.openapi
        for gone in [name for name, (_, seen_s) in self._beats.items() if now_s - seen_s > _FORGOTTEN_S]:
            del self._beats[gone]
            self._metrics.pop(gone, None)
        return self.phase

    def leave(self, replica: str) -> None:
        """A replica ends."""
        self._beats.pop(replica, None)
        self._metrics.pop(replica, None)

    def state(self) -> FrontState:
        """As it is now; a replica that was silent for some beats does not count as ready."""
        now_s = time.monotonic()
        fresh = [beat for beat, seen_s in self._beats.values() if now_s - seen_s < 6 * BEAT_S]
        return FrontState(
            ready=sum(beat.state == "ready" and beat.phase == "serve" for beat in fresh),
            ending=sum(beat.phase != "serve" for beat in fresh),
            known=len(fresh),
            held=sum(beat.held for beat in fresh),
            refusal=self.refusal,
        )

    def _made(self) -> ASGIApp:
        async def health(request: Request) -> Response:
            return self._reply(200, "ok")

        async def ready(request: Request) -> Response:
            if self.phase != "serve":
                return self._reply(503, "draining")
            good = self.state().ready > 0
            return self._reply(200 if good else 503, "ready" if good else "starting")

        async def metrics(request: Request) -> Response:
            return Response(join_metrics(self._metrics), headers={"content-type": CONTENT_TYPE})

        async def openapi(request: Request) -> Response:
            if self._openapi is None:
                raise HTTPException(503)
            return JSONResponse(self._openapi)

        async def wrong(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            messages = {404: "there is no such route", 405: "this route has other methods"}
            fault = Fault(error.status_code, messages.get(error.status_code, "not now"))
            return Response(fault.body(), fault.status, media_type="application/json")

        routes = [
            Route(path, answer)
            for path, answer in (
                ("/health", health),
                ("/ready", ready),
                ("/metrics", metrics),
                ("/openapi.json", openapi),
            )
        ]
        return Guard(
            Starlette(routes=routes, exception_handlers={HTTPException: wrong}),
            keys=self._keys,
            max_body_bytes=_BODY_BYTES,
            upload_timeout_s=30.0,
            on_refused=lambda reason: None,
            check_room=lambda: None,
        )

    def _reply(self, status: int, word: str) -> Response:
        state = self.state()
        record = {"status": word, "replicas": {"ready": state.ready, "wanted": self._wanted}}
        return JSONResponse(record, status_code=status)


class Front:
    """The deployment: `Desk` as Ray Serve calls it. `app` is Ray Serve's name for the ASGI application."""

    app: Desk

    async def take(self, beat: Beat) -> Phase:
        return self.app.take(beat)

    async def leave(self, replica: str) -> None:
        self.app.leave(replica)

    async def refuse(self, refusal: Refusal) -> None:
        self.app.refusal = refusal

    async def enter(self, phase: Phase) -> None:
        self.app.phase = phase

    async def state(self) -> FrontState:
        return self.app.state()


def join_metrics(pages: dict[str, str]) -> bytes:
    """The pages of several replicas as one, each sample with a label that says whose it is."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, page in sorted(pages.items()):
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                if line not in head:
                    head.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, replica))
    lines = [line for family, head in heads.items() for line in (*head, *samples.get(family, []))]
    return ("\n".join(lines) + "\n").encode()


def _labelled(sample: str, replica: str) -> str:
    name, brace, rest = sample.partition("{")
    if brace:
        return f'{name}{{replica="{replica}",{rest}'
    name, _, value = sample.partition(" ")
    return f'{name}{{replica="{replica}"}} {value}'
