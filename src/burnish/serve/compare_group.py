"""Several services as one server: opened one after another, drained and ended together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from burnish.errors import BurnishError, WorkerError
from burnish.serve.admission import Admission
from burnish.serve.engine_client import EngineClient
from burnish.serve.metrics import Metrics
from burnish.serve.service import Service
from burnish.serve.settings import ServeSettings


class ServiceGroup:
    """What `server.run_server` asks of a service, of several at once.

    Args:
        services: the first one's settings are the server's.
        vital: the server ends when all of these are given up; the others' failures stay their own.
        first_is_open: somebody else opens and closes the first service.
    """

    def __init__(self, services: Sequence[Service], *, vital: Sequence[Service], first_is_open: bool = False) -> None:
        assert services
        assert vital
        self.services = tuple(services)
        self._ours = self.services[1:] if first_is_open else self.services
        self.engine = Engines([service.engine for service in services], [service.engine for service in vital])
        self.admission = Admissions([service.admission for service in services])
        self._opening: asyncio.Task[None] | None = None

    @property
    def settings(self) -> ServeSettings:
        return self.services[0].settings

    @property
    def metrics(self) -> Metrics:
        return self.services[0].metrics

    @property
    def ready(self) -> bool:
        """Requests are taken, and no model is still to be loaded."""
        states = {service.engine.state for service in self.services}
        return "ready" in states and "starting" not in states and not self.admission.draining

    def say(self, line: str) -> None:
        self.services[0].say(line)

    async def open(self) -> None:
        """Load the engines in the background, one after another, so that each sees what memory is left for it."""
        self._opening = asyncio.create_task(self._open_all(), name="burnish-open")

    async def _open_all(self) -> None:
        for service in self.services:
            if service in self._ours:
                await service.open()
            try:
                await service.engine.settled()
            except BurnishError as error:
                self.say(f"{service.served.models[0].name}: {error.message}")

    async def close(self) -> None:
        """End all processes."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        await asyncio.gather(*[service.close() for service in self._ours])


class Engines:
    """The engines of a group."""

    def __init__(self, engines: Sequence[EngineClient], vital: Sequence[EngineClient]) -> None:
        self._engines = engines
        self._vital = vital

    async def settled(self) -> None:
        """Wait until every engine is loaded or given up.

        Raises:
            BurnishError: the vital ones are all given up; the last one's error.
        """
        results = await asyncio.gather(*[engine.settled() for engine in self._engines], return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, BurnishError):
                raise result
        if all(engine.error is not None for engine in self._vital):
            raise await self.broken()

    async def broken(self) -> BurnishError:
        """Wait until all vital engines are given up; returns why the last one was."""
        return (await asyncio.gather(*[engine.broken() for engine in self._vital]))[-1]

    def fail_all(self, error: WorkerError) -> None:
        for engine in self._engines:
            engine.fail_all(error)


class Admissions:
    """Who may come into any of a group's services."""

    def __init__(self, admissions: Sequence[Admission]) -> None:
        self._admissions = admissions
        self.on_drain: list[Callable[[], None]] = []

    @property
    def held(self) -> int:
        return sum(admission.held for admission in self._admissions)

    @property
    def draining(self) -> bool:
        return self._admissions[0].draining

    @draining.setter
    def draining(self, value: bool) -> None:
        for admission in self._admissions:
            admission.draining = value
        if value:
            for hear in self.on_drain:
                hear()
