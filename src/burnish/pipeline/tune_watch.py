"""Who is told what while a model is tuned: the progress bar, steps.jsonl, a tracker, a trace where one is wanted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from burnish.measure.formatting import format_bytes, format_rate
from burnish.pipeline.progress import Progress
from burnish.pipeline.step_log import LOG_NAME, StepLog
from burnish.track.null import NullTracker
from burnish.track.protocol import Tracker
from burnish.train.profile import StepClock
from burnish.train.results import EvalRecord, StepRecord, recent_loss
from burnish.train.trace import TraceRecorder

TRACE_NAME = "trace.json"
MOST_OPERATORS = 20
_ARTIFACTS = ("burnish.json", "run.json", LOG_NAME, TRACE_NAME)
_DOING = {"evaluation": "evaluating", "saving": "saving"}


class TuneWatch:
    """The callbacks of a tuning run, for the time of a block; `clock` is what the loop measures with.

    Args:
        folder: of the run.
        label: what the progress bar calls the work.
        total_steps: planned.
        max_seconds: the time budget, which the bar follows where it ends first.
        after_step: the step that a resumed run goes on from.
        start_bytes: resident set before the model was loaded.
        trace: record a trace of a few steps on this device; None for none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        label: str,
        total_steps: int,
        progress: Progress,
        max_seconds: float | None = None,
        after_step: int = 0,
        start_bytes: int | None = None,
        tracker: Tracker | None = None,
        trace: torch.device | None = None,
    ) -> None:
        self.log = StepLog(folder / LOG_NAME, after_step=after_step)
        self.clock = StepClock(on_phase=self._on_phase, start_bytes=start_bytes)
        self.tracker: Tracker = tracker or NullTracker()
        self.trace: TraceRecorder | None = None
        self._folder = folder
        self._label, self._total, self._max_seconds = label, max(1, total_steps), max_seconds
        self._progress = progress
        self._steps: list[StepRecord] = []
        self._done, self._note, self._elapsed, self._last_step = after_step, "", 0.0, after_step
        if trace is not None:
            self.trace = TraceRecorder(folder / TRACE_NAME, total_steps=total_steps - after_step, device=trace)

    def on_step(self, record: StepRecord) -> None:
        """Tell everybody of a step."""
        if self.trace is not None:
            self.trace.step_done()
        self.log.step(record)
        self.tracker.metrics(record.figures(), step=record.step)
        self._steps = [*self._steps[-19:], record]
        self._elapsed += record.seconds
        self._last_step = self._done = record.step
        if self._max_seconds is not None:
            self._done = max(self._done, int(self._total * min(1.0, self._elapsed / self._max_seconds)))
        parts = [f"loss {recent_loss(self._steps):.3f}"]
        if record.tokens_per_s is not None:
            parts.append(f"{format_rate(record.tokens_per_s)} tokens/s")
        if record.memory_bytes is not None:
            parts.append(format_bytes(record.memory_bytes))
        self._note = ", ".join(parts)
        self._show(self._note)

    def on_evaluation(self, record: EvalRecord) -> None:
        """Tell everybody of an evaluation."""
        self.log.evaluation(record)
        figures = {"eval_loss": record.loss, **record.figures}
        known = {name: float(value) for name, value in figures.items() if value is not None}
        self.tracker.metrics(known, step=record.step)
        self._show(self._note)

    @contextmanager
    def saving(self, path: Path) -> Iterator[None]:
        """The block writes the run's result."""
        begin = time.perf_counter()
        with self.clock.mark("saving"):
            yield
        self.log.saving(self._last_step, path, time.perf_counter() - begin)
        self._show(self._note)

    def begin_tracking(self, run: str, settings: Mapping[str, Any]) -> None:
        """Start the tracker with the settings under flat names, as every tracker takes them."""
        self.tracker.start(run, resumed=self._last_step > 0)
        self.tracker.params(dict(_flat(settings)))

    def end_tracking(self, figures: Mapping[str, float | None], *, interrupted: bool) -> None:
        """Send the run's figures as a whole, the files it wrote and what it taught, and close the tracker."""
        self.tracker.metrics({name: float(value) for name, value in figures.items() if value is not None})
        for name in _ARTIFACTS:
            if (self._folder / name).is_file():
                self.tracker.artifact(self._folder / name)
        if not interrupted and any(self._folder.glob("*.safetensors")):
            self.tracker.model(self._folder, name=self._folder.resolve().name)
        self.tracker.finish("interrupted" if interrupted else "finished")

    def __enter__(self) -> TuneWatch:
        if self.trace is not None:
            self.trace.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The loop is over, however it ended; after an error so is tracking."""
        self.log.close()
        if error is not None:
            self.tracker.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        elif self.trace is not None:
            self.trace.close()

    @property
    def trace_path(self) -> str | None:
        """The trace that was written."""
        return str(self.trace.path) if self.trace is not None and self.trace.written else None

    def operators(self) -> list[dict[str, Any]]:
        """The dearest operators of the trace."""
        return [asdict(operator) for operator in self.trace.operators[:MOST_OPERATORS]] if self.trace else []

    def notes(self) -> list[str]:
        """What whoever asked for the run should hear."""
        lines = [self.log.broken] if self.log.broken else []
        if self.trace is not None and not self.trace.written:
            lines.append("no trace: the run ended before a step could be recorded")
        return lines

    def _on_phase(self, phase: str) -> None:
        self._show(f"{self._note}, {_DOING[phase]}" if self._note else _DOING[phase])

    def _show(self, note: str) -> None:
        self._progress(self._label, min(self._done, self._total), self._total, note)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs
