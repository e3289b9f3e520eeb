"""A trace of a few steps, operator by operator, in Chrome's format: for chrome://tracing and ui.perfetto.dev.

Tracing slows the steps it covers, so it is asked for, begins after the warm-up and ends by itself. The figures of every
step are in `profile.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from burnish.models.atomic_files import writing_to
from burnish.train.profile import OTHER, PHASES

NUM_STEPS = 3
SKIPPED_STEPS = 2  # allocators, caches and compiled code are warming up


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One kind of operator over the traced steps.

    Attributes:
        calls: how often it ran.
        seconds: in itself, without the operators it called; on the card where there is one.
        share: of all operators' seconds, 0..1.
    """

    name: str
    calls: int
    seconds: float
    share: float


class TraceRecorder:
    """Records steps and writes them to `path` when enough are seen, or at `close`.

    Args:
        path: the file; written whole or not at all.
        total_steps: of the run; a run too short for a warm-up is traced from where it leaves a step to trace.
        num_steps: steps to record.
        device: what the run computes on.
    """

    def __init__(self, path: Path, *, total_steps: int, device: torch.device, num_steps: int = NUM_STEPS) -> None:
        self.path, self.num_steps = path, num_steps
        self.operators: list[Operator] = []
        self._skip = max(0, min(SKIPPED_STEPS, total_steps - num_steps))
        self._device = device
        self._seen = 0
        self._profiler: Any = None
        self.written = False

    def start(self) -> None:
        """The run begins."""
        if self._skip == 0:
            self._begin()

    def step_done(self) -> None:
        """A step is over."""
        self._seen += 1
        if self._profiler is not None and self._seen == self._skip + self.num_steps:
            self._end()
        elif self._seen == self._skip:
            self._begin()

    def close(self) -> None:
        """The run is over; what was recorded until now is written."""
        if self._profiler is not None:
            self._end()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def _end(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.json")
        try:
            with writing_to(self.path):
                profiler.export_chrome_trace(str(temporary))
                os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        self.operators = _operators(profiler, on_card=self._device.type == "cuda")
        self.written = True


def _operators(profiler: Any, *, on_card: bool) -> list[Operator]:
    """All operators, the dearest first; our own names of phases are no operators."""
    field = "self_device_time_total" if on_card else "self_cpu_time_total"
    rows = [(row.key, row.count, getattr(row, field) / 1e6) for row in profiler.key_averages()]
    rows = [row for row in rows if row[0] not in (*PHASES, OTHER) and row[2] > 0]
    total = sum(seconds for _, _, seconds in rows)
    return sorted(
        (Operator(name=name, calls=calls, seconds=seconds, share=seconds / total) for name, calls, seconds in rows),
        key=lambda operator: -operator.seconds,
    )
