"""What Ray's workers import by name: engines that need no model."""

from __future__ import annotations

import time
from pathlib import Path

from queue_fakes import TurningEngine

from burnish.errors import CheckpointError

_LONGEST_S = 300.0


def gated_engine(gate: str, threads: int) -> TurningEngine:
    """Takes no step before the file `gate` exists."""

    def wait() -> None:
        ends = time.monotonic() + _LONGEST_S
        while not Path(gate).exists() and time.monotonic() < ends:
            time.sleep(0.01)

    return TurningEngine(slots=4, on_step=wait)


def slow_engine(threads: int) -> TurningEngine:
    """Some milliseconds a step, so that there is time to disturb it."""
    return TurningEngine(slots=4, on_step=lambda: time.sleep(0.005))


def missing_engine(threads: int) -> TurningEngine:
    """A model that is not on the node."""
    raise CheckpointError("there is no model here")
