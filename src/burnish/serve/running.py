"""What a running server has to know of whatever it serves: one service, or several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from burnish.errors import BurnishError, WorkerError
from burnish.serve.settings import ServeSettings


class RunningEngine(Protocol):
    """See `EngineClient`."""

    async def settled(self) -> None: ...
    async def broken(self) -> BurnishError: ...
    def fail_all(self, error: WorkerError, /) -> None: ...


class RunningAdmission(Protocol):
    """See `Admission`."""

    @property
    def draining(self) -> bool: ...
    @draining.setter
    def draining(self, value: bool, /) -> None: ...
    @property
    def held(self) -> int: ...


class Running(Protocol):
    """A service, or a group of them."""

    @property
    def settings(self) -> ServeSettings: ...
    @property
    def engine(self) -> RunningEngine: ...
    @property
    def admission(self) -> RunningAdmission: ...
    @property
    def metrics(self) -> Any: ...
    @property
    def say(self) -> Callable[[str], None]: ...
