"""Tracking into one text file: a JSON object per line, appended and flushed as it happens.

A crash loses at most the line that was being written. Several runs may share a file: every line names its run. NaN and
infinities, which JSON lacks, are written as the strings "NaN", "Infinity" and "-Infinity" and read back as floats.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import Any

from burnish.errors import ConfigError, DataError
from burnish.track.protocol import Status, Tracker

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlTracker:
    """Appends to `path`; its folder is made when the run starts.

    Args:
        path: the file.
        clock: seconds since the epoch, for the lines' "time".
        run: what lines call the run; the name that `start` gives when None.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, run: str | None = None) -> None:
        self.path = Path(path)
        self._clock = clock
        self._called = run
        self._file: BufferedWriter | None = None
        self._run = ""

    def start(self, run: str, *, resumed: bool = False) -> None:
        """Open the file and write the first line; one that is resumed begins another run here.

        Raises:
            ConfigError: the file cannot be opened for appending.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._file is not None:
                self._file.close()
            self._file = self.path.open("ab")
            if lacks_newline(self.path):
                self._file.write(b"\n")  # a crash cut the last line; it stays readable as one bad line
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self._run = self._called or run
        self._write("start", {"resumed": True} if resumed else {})

    def params(self, params: Mapping[str, Any]) -> None:
        """One line with all of them; values that JSON does not know are written as text."""
        self._write("params", {"params": dict(params)})

    def metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """One line with all of them."""
        self._write("metrics", {"step": step, "metrics": dict(metrics)})

    def artifact(self, path: Path) -> None:
        """One line with the path."""
        self._write("artifact", {"path": str(path)})

    def text(self, name: str, text: str) -> None:
        """One line with the whole text."""
        self._write("text", {"name": name, "text": text})

    def model(self, folder: Path, *, name: str) -> None:
        """One line with the path."""
        self._write("model", {"path": str(folder), "name": name})

    def child(self, name: str) -> Tracker:
        """One that writes into the same file, as the run RUN/NAME."""
        return JsonlTracker(self.path, clock=self._clock, run=f"{self._run}/{name}")

    def finish(self, status: Status) -> None:
        """Write the last line, force it to the disk and close the file."""
        self._write("finish", {"status": status})
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        if self._file is None:
            raise ConfigError(f"the tracker of {self.path} has no run", remedy="Call start first.")
        record = {"event": event, "run": self._run, "time": round(self._clock(), 3), **fields}
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        self._file.write(line.encode("utf-8", "replace") + b"\n")
        self._file.flush()


@dataclass
class TrackedRun:
    """One run as read back.

    Attributes:
        name: of the run.
        params: all of them; later ones win.
        metrics: (step, figures) in the order they came.
        artifacts: paths as they were given, of models as well.
        status: None for a run that never finished.
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    metrics: list[tuple[int | None, dict[str, float]]] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    status: str | None = None

    def series(self, name: str) -> list[tuple[int | None, float]]:
        """(step, value) of one figure."""
        return [(step, figures[name]) for step, figures in self.metrics if name in figures]


def read_runs(path: Path) -> list[TrackedRun]:
    """Every run of a file, oldest first; a line that a crash cut off is passed over.

    Two starts of the same name are two runs.

    Raises:
        DataError: the file is missing.
    """
    runs: list[TrackedRun] = []
    current: dict[str, TrackedRun] = {}
    for record in _records(Path(path)):
        name = str(record.get("run"))
        if record["event"] == "start" or name not in current:
            current[name] = TrackedRun(name=name)
            runs.append(current[name])
        run = current[name]
        if record["event"] == "params":
            run.params.update(record.get("params", {}))
        elif record["event"] == "metrics":
            run.metrics.append((record.get("step"), record.get("metrics", {})))
        elif record["event"] in ("artifact", "model"):
            run.artifacts.append(record.get("path", ""))
        elif record["event"] == "finish":
            run.status = record.get("status")
    return runs


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    for line in lines:
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError:
            continue
        if isinstance(record, dict) and "event" in record:
            yield _numbers(record)


def plain(value: Any) -> Any:
    """JSON values only: mappings and sequences all the way down, numpy's and torch's scalars as numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, bool | int | str):
        return value
    if not isinstance(value, float) and hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return plain(value.item())
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value)


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Figures that JSON could not write come back as floats; parameters stay as they are."""
    metrics = record.get("metrics")
    if isinstance(metrics, dict):
        special = {key: _SPECIAL[item] for key, item in metrics.items() if isinstance(item, str) and item in _SPECIAL}
        record["metrics"] = {**metrics, **special}
    return record


def lacks_newline(path: Path) -> bool:
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
