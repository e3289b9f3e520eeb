"""Telling a tracker of a stage: its settings, what its manifest or record holds, its files and its model."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from burnish.errors import BurnishError
from burnish.measure.hardware import hardware_record, version_record
from burnish.measure.json_values import to_plain
from burnish.models.adapter_files import is_adapter_folder
from burnish.models.loading import resolve_model
from burnish.pipeline.manifest import MANIFEST_NAME, describe_input, read_manifest
from burnish.pipeline.opening import Source
from burnish.track.making import make_tracker
from burnish.track.null import NullTracker
from burnish.track.protocol import Tracker

_LONGEST_TEXT = 500


class TrackedStage:
    """What a stage tells its tracker."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.tracker, self.name = tracker, name
        self._began_s = time.time()

    def made(self, folder: str | Path, *, passed: bool = True) -> None:
        """The stage has written a model's folder; one that failed its gate is told of, and not logged as a model."""
        folder = Path(folder)
        manifest = read_manifest(folder) or {}
        self.tracker.params(dict(flat(manifest.get("config") or {})))
        inputs = dict(flat(manifest.get("inputs") or {}, "input."))
        self.tracker.params(inputs | dict(flat(manifest.get("data") or {}, "data.")))
        self.figures({**(manifest.get("figures") or {}), "gate": manifest.get("gate")})
        self.tracker.params(dict(flat(manifest.get("versions") or {}, "version.")))
        self.tracker.params(dict(flat(manifest.get("hardware") or {}, "hardware.")))
        if (folder / MANIFEST_NAME).is_file():
            self.tracker.artifact(folder / MANIFEST_NAME)
        if passed:
            self.tracker.model(folder, name=folder.resolve().name)

    def inputs(self, models: Mapping[str, str | None], source: Source) -> None:
        """The stage has read these models: the fingerprints of those that are folders on this machine by now."""
        if isinstance(self.tracker, NullTracker):
            return
        for name, model in models.items():
            if model is not None:
                with contextlib.suppress(OSError, BurnishError):  # a run that has ended well is not spoilt
                    described = describe_input(_folder_of(model, source), name=model)
                    self.tracker.params(dict(flat(described, f"input.{name}.")))

    def record(self, record: Any) -> None:
        """The stage gives a record and no folder: its figures, and the whole of it as a file NAME.json."""
        plain = to_plain(record)
        self.figures(plain)
        self.tracker.text(f"{self.name}.json", json.dumps(plain, indent=1, ensure_ascii=False))

    def figures(self, figures: Mapping[str, Any]) -> None:
        """Numbers as figures, short texts and verdicts as facts; lists are left to the file that holds them all."""
        numbers: dict[str, float] = {}
        words: dict[str, Any] = {}
        for name, value in flat(figures):
            if isinstance(value, bool) or (isinstance(value, str) and len(value) <= _LONGEST_TEXT):
                words[f"result.{name}"] = value
            elif isinstance(value, int | float) and math.isfinite(value):
                numbers[name] = float(value)
        self.tracker.metrics(numbers)
        self.tracker.params(words)

    def failed_in(self, folder: Path | None) -> None:
        """The stage has raised: what it wrote until then, if that is of this run."""
        if folder is not None and (folder / MANIFEST_NAME).is_file():
            with contextlib.suppress(OSError, BurnishError):  # what failed first is what people have to know
                if (folder / MANIFEST_NAME).stat().st_mtime >= self._began_s - 1:
                    self.made(folder, passed=False)


@contextmanager
def tracked(
    tracker: Tracker,
    name: str,
    settings: Mapping[str, Any] | None = None,
    *,
    folder: str | Path | None = None,
    title: str | None = None,
) -> Iterator[TrackedStage]:
    """A stage as a run of its own, for the time of a block.

    Args:
        settings: what is known before it begins.
        folder: where it writes.
        title: the run's name; the stage's if None.
    """
    stage = TrackedStage(tracker, name)
    tracker.start(title or name)
    tracker.params(dict(flat(to_plain({"stage": name, **(settings or {})}))))
    machine = {"version": version_record(), "hardware": hardware_record()}
    tracker.params(dict(flat(to_plain(machine))))
    try:
        yield stage
    except BaseException as error:
        stage.failed_in(None if folder is None else Path(folder))
        tracker.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    tracker.finish("finished")


@contextmanager
def tracked_to(
    uri: str | None,
    name: str,
    settings: Mapping[str, Any] | None = None,
    *,
    folder: str | Path | None = None,
    on: str | Path | None = None,
    say: Callable[[str], None],
    warn: Callable[[str], None] | None = None,
) -> Iterator[TrackedStage]:
    """As `tracked`, with the tracker of a URI.

    Args:
        on: the folder or model whose name follows the stage's in the run's name.
        say, warn: as `make_tracker`; what failed is said where there is no `warn`.

    Raises:
        ConfigError, MissingExtraError: as `make_tracker`.
    """
    title = None if on is None else f"{name}-{os.path.basename(os.path.abspath(on))}"
    tracker = make_tracker(uri, beside=folder, warn=warn or say, say=say)
    with tracked(tracker, name, settings, folder=folder, title=title) as stage:
        yield stage


def _folder_of(model: str, source: Source) -> Path:
    if is_adapter_folder(model):
        return Path(model)
    return resolve_model(model, revision=source.revision, offline=True, allow_pickle=source.allow_pickle)


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Mappings within mappings as one level of names joined by dots; lists of mappings and nothings are left out."""
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            continue
        elif value is not None:
            pairs.append((f"{prefix}{name}", value))
    return pairs
