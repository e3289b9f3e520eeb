"""A tracker that fails never breaks the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from burnish.track.guarded import GuardedTracker, TrackingWarning
from burnish.track.null import NullTracker
from burnish.track.protocol import Tracker


class Broken(NullTracker):
    """Raises at one call."""

    def __init__(self, at: str, error: BaseException | None = None) -> None:
        self.at, self.error, self.calls = at, error or OSError("the server\nis down"), 0

    def _maybe(self, name: str) -> None:
        self.calls += 1
        if name == self.at:
            raise self.error

    def start(self, run: str, *, resumed: bool = False) -> None:
        self._maybe("start")

    def params(self, params: Mapping[str, Any]) -> None:
        self._maybe("params")

    def metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        self._maybe("metrics")

    def artifact(self, path: Path) -> None:
        self._maybe("artifact")

    def finish(self, status: str) -> None:
        self._maybe("finish")


def whole_run(tracker: Tracker) -> None:
    tracker.start("r")
    tracker.params({"a": 1})
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.metrics({"loss": 0.5}, step=2)
    tracker.artifact(Path("x"))
    tracker.finish("finished")


@pytest.mark.parametrize(("at", "calls"), [("start", 1), ("params", 2), ("metrics", 3), ("artifact", 5), ("finish", 6)])
def test_failure_anywhere_warns_once_and_ends_tracking(at: str, calls: int) -> None:
    lines: list[str] = []
    inner = Broken(at)
    guarded = GuardedTracker(inner, warn=lines.append)
    whole_run(guarded)
    assert inner.calls == calls
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert f"stopped at {at}: the server is down" in lines[0]
    assert guarded.broken is inner.error


def test_failure_is_a_python_warning_by_default() -> None:
    with pytest.warns(TrackingWarning, match="the server is down"):
        whole_run(GuardedTracker(Broken("metrics")))


def test_working_tracker_gets_everything_without_a_word() -> None:
    inner, lines = Broken("never"), []
    whole_run(GuardedTracker(inner, warn=lines.append))
    assert (inner.calls, lines) == (6, [])


def test_interrupt_is_not_held_back() -> None:
    with pytest.raises(KeyboardInterrupt):
        whole_run(GuardedTracker(Broken("metrics", KeyboardInterrupt())))
