"""Mirroring a run to Weights & Biases. WANDB_MODE=offline keeps it on the disk until `wandb sync`.

The package is the extra "wandb"; it is imported when a tracker is made, so that a missing one is known before the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish._optional import require
from burnish.track.prefixed import PrefixedTracker
from burnish.track.protocol import Status, Tracker

_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
_EXIT_CODES: dict[Status, int] = {"finished": 0, "failed": 1, "interrupted": 130}


class WandbTracker:
    """One run of a W&B project.

    Metrics with a step become its history, metrics without one its summary, params its config, files its artifacts.

    Args:
        project: the project.
        run: the run's name there, and its id: the same name goes on where it stopped. None takes the name that `start`
            gives and a fresh id.

    Raises:
        MissingExtraError: the package is not installed.
    """

    def __init__(self, project: str, run: str | None = None) -> None:
        self.project, self.run = project, run
        self._wandb: Any = require("wandb", extra="wandb")
        self._active: Any = None

    def start(self, run: str, *, resumed: bool = False) -> None:
        """Begin the run; nothing of W&B's is written to stdout, and the console is not recorded."""
        wandb = self._wandb
        self._active = wandb.init(
            project=self.project,
            name=self.run or run,
            id=None if self.run is None else _NAME.sub("-", self.run),
            resume=None if self.run is None else "allow",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def params(self, params: Mapping[str, Any]) -> None:
        """Add to the run's config; later ones win."""
        self._active.config.update(dict(params), allow_val_change=True)

    def metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """A row of the history, or figures of the summary."""
        if step is None:
            self._active.summary.update(dict(metrics))
        else:
            self._active.log(dict(metrics), step=step)

    def artifact(self, path: Path) -> None:
        """Add a file or a folder as an artifact named after it."""
        path = Path(path)
        artifact = self._wandb.Artifact(_NAME.sub("-", path.name) or "files", type="model" if path.is_dir() else "file")
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._active.log_artifact(artifact)

    def text(self, name: str, text: str) -> None:
        """Add a file as an artifact named after it."""
        artifact = self._wandb.Artifact(_NAME.sub("-", name), type="file")
        with artifact.new_file(name) as file:
            file.write(text)
        self._active.log_artifact(artifact)

    def model(self, folder: Path, *, name: str) -> None:
        """Add the folder as an artifact of the type "model", with this name."""
        artifact = self._wandb.Artifact(_NAME.sub("-", name), type="model")
        artifact.add_dir(str(folder))
        self._active.log_artifact(artifact)

    def child(self, name: str) -> Tracker:
        """W&B knows no runs within runs: a part's names begin with its own."""
        return PrefixedTracker(self, name)

    def finish(self, status: Status) -> None:
        """End the run; W&B shows anything but "finished" as failed, and the summary says which it was."""
        self._active.summary.update({"status": status})
        self._active.finish(exit_code=_EXIT_CODES[status])
