"""A tracker that cannot break a run: whatever it raises becomes one warning, and the run goes on untracked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from burnish.track.null import NullTracker
from burnish.track.protocol import Status, Tracker


class TrackingWarning(UserWarning):
    """Tracking failed; the run itself is not affected."""


class GuardedTracker:
    """Passes everything on to `tracker` until it raises once; then warns once and stays silent.

    KeyboardInterrupt and its like are not held back.

    Args:
        tracker: does the work.
        warn: takes the one line; a `TrackingWarning` by default.
    """

    def __init__(self, tracker: Tracker, *, warn: Callable[[str], None] | None = None) -> None:
        self.tracker = tracker
        self.broken: Exception | None = None
        self._warn = warn or _warn

    def start(self, run: str, *, resumed: bool = False) -> None:
        """As the tracker's."""
        self._guard("start", lambda: self.tracker.start(run, resumed=resumed))

    def params(self, params: Mapping[str, Any]) -> None:
        """As the tracker's."""
        self._guard("params", lambda: self.tracker.params(params))

    def metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """As the tracker's."""
        self._guard("metrics", lambda: self.tracker.metrics(metrics, step=step))

    def artifact(self, path: Path) -> None:
        """As the tracker's."""
        self._guard("artifact", lambda: self.tracker.artifact(path))

    def text(self, name: str, text: str) -> None:
        """As the tracker's."""
        self._guard("text", lambda: self.tracker.text(name, text))

    def model(self, folder: Path, *, name: str) -> None:
        """As the tracker's."""
        self._guard("model", lambda: self.tracker.model(folder, name=name))

    def child(self, name: str) -> Tracker:
        """The tracker's child, guarded by itself."""
        made: list[Tracker] = []
        self._guard("child", lambda: made.append(self.tracker.child(name)))
        return GuardedTracker(made[0], warn=self._warn) if made else NullTracker()

    def finish(self, status: Status) -> None:
        """As the tracker's."""
        self._guard("finish", lambda: self.tracker.finish(status))

    def _guard(self, what: str, call: Callable[[], None]) -> None:
        if self.broken is not None:
            return
        try:
            call()
        except Exception as error:
            self.broken = error
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn(f"tracking stopped at {what}: {reason}; the run goes on, and its own record is complete")


def _warn(line: str) -> None:
    warnings.warn(line, TrackingWarning, stacklevel=4)
