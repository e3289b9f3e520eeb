"""A queue's worker as a Ray actor: loads its engine, works until it is drained, and says how it is doing."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from burnish.errors import BurnishError, ConfigError
from burnish.scale.opening import QueueAddress, open_worker
from burnish.scale.ray_shards import Shards, leading
from burnish.scale.worker import Worker
from burnish.scale.worker_settings import WorkerReport

_MOST_LINES = 100


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What every worker of a fleet is told. A plain value that crosses machines.

    Attributes:
        open_engine: makes the engine on the worker's node, told how many threads its cores allow; importable there.
        model, slots, lease_s, until_empty: see `open_worker`.
        host: the only machine that the queue can be reached from; None where any can.
        shards: how the engine is cut over several actors; None for one that is whole.
    """

    address: QueueAddress
    open_engine: Callable[[int], Any]
    model: str
    slots: int
    threads: int
    lease_s: float = 60.0
    until_empty: bool = False
    host: str | None = None
    shards: Shards | None = None


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a worker ended: with a report, or with an error that is not worth a traceback."""

    report: WorkerReport | None = None
    error: str | None = None
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class News:
    """Where a worker runs, whether it has its engine, items finished so far, and what it said since the last time."""

    host: str
    pid: int
    working: bool
    finished: int
    said: tuple[str, ...]


class RayWorker:
    """The actor. `run` takes one of its threads for as long as it works; the other methods return at once."""

    def __init__(self, task: WorkerTask, name: str) -> None:
        self._task = task
        self._name = name
        self._worker: Worker | None = None
        self._draining = False
        self._finished = 0
        self._said: list[str] = []

    def run(self) -> Ending:
        """Load the engine and work until a drain, or until the queue is empty where the task says so."""
        try:
            if self._task.shards is None:
                return Ending(report=self._run())
            with leading(self._task.shards):
                return Ending(report=self._run())
        except BurnishError as error:
            return Ending(error=error.message, exit_code=error.exit_code)
        except MemoryError:
            return Ending(error="ran out of memory", exit_code=5)

    def drain(self) -> None:
        """Finish what is begun, give back the rest; `run` then returns."""
        self._draining = True
        if self._worker is not None:
            self._worker.drain()

    def news(self) -> News:
        """What happened; lines are told once."""
        said, self._said = self._said, []
        return News(
            host=socket.gethostname(),
            pid=os.getpid(),
            working=self._worker is not None,
            finished=self._finished,
            said=tuple(said[:_MOST_LINES]),
        )

    def _run(self) -> WorkerReport:
        task = self._task
        here = socket.gethostname()
        if task.host is not None and here != task.host:
            raise ConfigError(
                f"the queue is on {task.host} alone, and a worker was placed on {here}",
                remedy="Name servers with --store and --broker that every node reaches.",
            )
        with open_worker(
            task.address,
            lambda: task.open_engine(task.threads),
            model=task.model,
            slots=task.slots,
            name=self._name,
            until_empty=task.until_empty,
            lease_s=task.lease_s,
            progress=self._count,
            say=self._say,
        ) as worker:
            self._worker = worker
            if self._draining:  # asked meanwhile
                worker.drain()
            return worker.run()

    def _count(self, finished: int) -> None:
        self._finished = finished

    def _say(self, text: str) -> None:
        self._said.append(text)
