"""The tracker of runs that nobody tracks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.track.protocol import Status, Tracker


class NullTracker:
    """Does nothing."""

    def start(self, run: str, *, resumed: bool = False) -> None:
        """Nothing."""

    def params(self, params: Mapping[str, Any]) -> None:
        """Nothing."""

    def metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Nothing."""

    def artifact(self, path: Path) -> None:
        """Nothing."""

    def text(self, name: str, text: str) -> None:
        """Nothing."""

    def model(self, folder: Path, *, name: str) -> None:
        """Nothing."""

    def child(self, name: str) -> Tracker:
        """Itself."""
        return self

    def finish(self, status: Status) -> None:
        """Nothing."""
