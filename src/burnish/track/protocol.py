"""What a tracker is: a mirror of a run. The run's own JSON record is the truth, and a tracker may fail at any time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

Status = Literal["finished", "failed", "interrupted"]


@runtime_checkable
class Tracker(Protocol):
    """Receives what a run knows, in this order: start, then anything, then finish."""

    def start(self, run: str, *, resumed: bool = False) -> None:
        """A run of this name begins, or goes on where it stopped."""
        ...

    def params(self, params: Mapping[str, Any]) -> None:
        """Settings and facts that do not change during the run; may be called several times."""
        ...

    def metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Figures, of a training step or of the run as a whole."""
        ...

    def artifact(self, path: Path) -> None:
        """A file or folder that the run has written."""
        ...

    def text(self, name: str, text: str) -> None:
        """A text, to be kept as a file of this name."""
        ...

    def model(self, folder: Path, *, name: str) -> None:
        """The folder of a model or an adapter that the run has made."""
        ...

    def child(self, name: str) -> Tracker:
        """A tracker for a part of this run, with a start and a finish of its own, while this run lasts."""
        ...

    def finish(self, status: Status) -> None:
        """The run is over; nothing is sent after this."""
        ...
