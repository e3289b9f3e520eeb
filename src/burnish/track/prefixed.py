"""A part of a run, for trackers that know no runs within runs: everything goes to the run, under names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.track.protocol import Status, Tracker


class PrefixedTracker:
    """Sends `loss` of the part `tune` as `tune/loss`.

    Args:
        whole: the run's tracker, which has begun.
        prefix: the part's name.
    """

    def __init__(self, whole: Tracker, prefix: str) -> None:
        self.whole, self.prefix = whole, prefix

    def start(self, run: str, *, resumed: bool = False) -> None:
        """Nothing: the whole run has begun."""

    def params(self, params: Mapping[str, Any]) -> None:
        """As the run's."""
        self.whole.params(self._named(params))

    def metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """As the run's."""
        self.whole.metrics(self._named(metrics), step=step)

    def artifact(self, path: Path) -> None:
        """As the run's."""
        self.whole.artifact(path)

    def text(self, name: str, text: str) -> None:
        """As the run's."""
        self.whole.text(f"{self.prefix}-{name}", text)

    def model(self, folder: Path, *, name: str) -> None:
        """As the run's."""
        self.whole.model(folder, name=name)

    def child(self, name: str) -> Tracker:
        """A part of this part."""
        return PrefixedTracker(self.whole, f"{self.prefix}/{name}")

    def finish(self, status: Status) -> None:
        """Say how the part ended."""
        self.whole.params({f"{self.prefix}/status": status})

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{self.prefix}/{name}": value for name, value in values.items()}
