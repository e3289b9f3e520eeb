"""One replica on Ray: the whole server of one machine, application, engine and template process, without its socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from burnish.errors import BurnishError, WorkerError
from burnish.serve.keys import KeyRing
from burnish.serve.ray_front import BEAT_S, Beat, Phase, Refusal
from burnish.serve.service import Served, Service
from burnish.serve.settings import ServeSettings

FRONT_APP, FRONT = "burnish-front", "Front"
_METRICS_EVERY = 4
_log = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """What each replica is. A plain value that crosses machines.

    Attributes:
        open_served: called on the replica's node; importable there.
        keys: None lets everybody in.
    """

    open_served: Callable[[], Served]
    settings: ServeSettings
    keys: KeyRing | None


class Gateway:
    """The ASGI application of one replica, made where it runs.

    It has started when its engine takes requests. What keeps the engine from being made is told to the front.
    """

    def __init__(self, plan: ReplicaPlan) -> None:
        self._plan = plan
        self._app: ASGIApp | None = None
        self._beating: asyncio.Task[None] | None = None
        self._phase: Phase = "serve"
        self.service: Service | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        assert self._app is not None
        await self._app({**scope, "root_path": ""}, receive, send)

    def check(self) -> None:
        """Raise when the engine was given up: Ray Serve then puts another replica in this one's place."""
        if self.service is not None and self.service.engine.error is not None:
            raise self.service.engine.error

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        from ray import serve

        front = serve.get_deployment_handle(FRONT, FRONT_APP)
        replica = serve.get_replica_context().replica_id.unique_id
        try:
            self.service, self._app = _made(self._plan)
        except BurnishError as error:
            await self._refuse(front, error)
            raise

        async def when_ready(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                assert self.service is not None
                try:
                    await self.service.engine.settled()
                except BurnishError as error:
                    await self._refuse(front, error)
                    await send({"type": "lifespan.startup.failed", "message": error.message})
                    return
                self._beating = asyncio.create_task(self._beat(front, replica))
            if message["type"].startswith("lifespan.shutdown") and self._beating is not None:
                self._beating.cancel()
                with suppress(Exception):
                    await front.leave.remote(replica)
            await send(message)

        await self._app(scope, receive, when_ready)

    async def _refuse(self, front: Any, error: BurnishError) -> None:
        with suppress(Exception):
            await front.refuse.remote(Refusal(kind=type(error).__name__, message=error.message))

    async def _beat(self, front: Any, replica: str) -> None:
        """Tell the front how it goes, and do what it says."""
        service, number = self.service, 0
        assert service is not None
        while True:
            app: Any = self._app
            with suppress(Exception):  # the front may be away, as it may be moved; requests go on
                beat = Beat(
                    replica=replica,
                    state=service.engine.state,
                    phase=self._phase,
                    held=service.admission.held,
                    metrics=service.metrics.exposition().decode() if number % _METRICS_EVERY == 0 else None,
                    openapi=app.openapi() if number % (60 * _METRICS_EVERY) == 0 else None,
                )
                self._enter(await front.take.remote(beat))
            number += 1
            await asyncio.sleep(BEAT_S)

    def _enter(self, phase: Phase) -> None:
        service = self.service
        assert service is not None
        self._phase = phase
        service.admission.draining = phase != "serve"
        if phase == "cut":
            service.engine.fail_all(WorkerError("the server is shutting down"))


class Replica:
    """The deployment: `Gateway` as Ray Serve calls it. `app` is Ray Serve's name for the ASGI application."""

    app: Gateway

    async def check_health(self) -> None:
        self.app.check()


def _made(plan: ReplicaPlan) -> tuple[Service, ASGIApp]:
    from burnish.serve.app import make_app

    service = Service(plan.open_served(), plan.settings, keys=plan.keys, say=_log.warning)
    return service, make_app(service)
