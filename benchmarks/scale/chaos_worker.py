"""A worker that kills its own process (SIGKILL) at a chosen point, for chaos.py. Nothing of this is in the package."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from burnish.engine.native import NativeEngine
from burnish.scale.brokers import Delivery
from burnish.scale.opening import QueueAddress, open_worker
from burnish.scale.store import Loaded, Outcome
from burnish.scale.worker import Worker

POINTS = ("received", "generating", "committed", "acked")
POISON = "this prompt kills"
_FLUSH_S = 0.3


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Die at `point`, the `count`th time it is reached."""

    point: str
    count: int


class _Fuse:
    def __init__(self, fault: Fault | None) -> None:
        self._fault = fault
        self._left = fault.count if fault else 0

    def reach(self, point: str) -> None:
        if self._fault is None or point != self._fault.point:
            return
        self._left -= 1
        if self._left <= 0:
            if point == "acked":
                time.sleep(_FLUSH_S)  # so that the broker has the acknowledgement
            os.kill(os.getpid(), signal.SIGKILL)


class DyingEngine(NativeEngine):
    """Dies while it generates, or of a prompt."""

    fuse: Any = None

    def submit(self, prompt: Any, params: Any = None, *, adapter: str | None = None) -> int:
        number = super().submit(prompt, params, adapter=adapter)
        if isinstance(prompt, str) and POISON in prompt:
            super().step()  # a part of the way
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    def step(self) -> Any:
        outputs = super().step()
        if self.scheduler.running:
            self.fuse.reach("generating")
        return outputs


def run_worker(address: QueueAddress, *, model: str, slots: int, fault: Fault | None, lease_s: float = 5.0) -> None:
    """One worker process, until SIGTERM drains it or its fault ends it."""
    fuse = _Fuse(fault)

    class DyingWorker(Worker):
        """Dies between two stages."""

        def receive(self, deliveries: Sequence[Delivery]) -> list[Loaded]:
            loaded = super().receive(deliveries)
            fuse.reach("received")
            return loaded

        def commit(self, outcomes: Sequence[Outcome]) -> None:
            super().commit(outcomes)
            fuse.reach("committed")

        def settle(self, deliveries: Sequence[Delivery]) -> None:
            super().settle(deliveries)
            fuse.reach("acked")

    def engine() -> NativeEngine:
        made = DyingEngine(model, max_num_seqs=slots, threads=1, dtype="float32", speculation="off")
        made.fuse = fuse
        return made

    with open_worker(
        address, engine, model=model, slots=slots, lease_s=lease_s, start_patience_s=300.0, make=DyingWorker
    ) as worker:
        signal.signal(signal.SIGTERM, lambda *_: worker.drain())
        worker.run()
