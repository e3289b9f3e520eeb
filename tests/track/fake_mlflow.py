"""MLflow in memory, stricter than the real one: what is sent twice is there twice. Calls may fail before or after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Lost(Exception):
    """The connection broke."""


class Refused(Exception):
    error_code = "INVALID_PARAMETER_VALUE"


@dataclass
class FakeRun:
    name: str
    tags: dict[str, str]
    start_ms: int
    status: str = "RUNNING"
    end_ms: int | None = None
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    files: list[tuple[str, bytes]] = field(default_factory=list)
    deleted: bool = False


class FakeMlflow:
    """One server; `fail` decides for each call, by its number from 1, "before", "after" or None."""

    def __init__(self) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.calls = 0
        self.fail: dict[int, str] = {}

    def __call__(self, destination: Any) -> Any:
        """As the class `Mlflow`."""
        return _Client(self)

    @property
    def active(self) -> list[FakeRun]:
        return [run for run in self.runs.values() if not run.deleted]


class _Client:
    def __init__(self, server: FakeMlflow) -> None:
        self._server = server

    def __getattribute__(self, name: str) -> Any:
        method = object.__getattribute__(self, name)
        if name.startswith("_"):
            return method
        server: FakeMlflow = self._server

        def call(*args: Any, **options: Any) -> Any:
            server.calls += 1
            mode = server.fail.get(server.calls)
            if mode == "before":
                raise Lost(name)
            result = method(*args, **options)
            if mode == "after":
                raise Lost(name)
            return result

        return call

    def experiment(self, destination: Any) -> str:
        return "1"

    def runs_with(self, experiment_id: str, tag: str, value: str) -> list[str]:
        found = [(run.start_ms, key) for key, run in self._server.runs.items() if run.tags.get(tag) == value]
        return [key for _, key in sorted(found) if not self._server.runs[key].deleted]

    def create_run(self, experiment_id: str, name: str, tags: dict[str, str], start_ms: int) -> str:
        key = f"id{len(self._server.runs)}"
        self._server.runs[key] = FakeRun(name, tags, start_ms)
        return key

    def delete_run(self, run_id: str) -> None:
        self._server.runs[run_id].deleted = True

    def is_deleted(self, run_id: str) -> bool:
        return self._server.runs[run_id].deleted

    def reopen_run(self, run_id: str) -> None:
        self._server.runs[run_id].status = "RUNNING"

    def end_run(self, run_id: str, status: str, end_ms: int) -> None:
        run = self._server.runs[run_id]
        run.status, run.end_ms = status, end_ms

    def has_ended(self, run_id: str, status: str, end_ms: int) -> bool:
        run = self._server.runs[run_id]
        return (run.status, run.end_ms) == (status, end_ms)

    def params(self, run_id: str) -> dict[str, str]:
        return dict(self._server.runs[run_id].params)

    def metric_places(self, run_id: str, name: str) -> set[tuple[int, int]]:
        return {(step, time) for key, _, time, step in self._server.runs[run_id].metrics if key == name}

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        run = self._server.runs[run_id]
        for name, value in (params or {}).items():
            if run.deleted or run.params.get(name, value) != value or "bad" in name:
                raise Refused(f"{name} has another value")
        if any("bad" in metric[0] for metric in metrics):
            raise Refused("a bad metric")
        run.params.update(params or {})
        run.tags.update(tags or {})
        run.metrics.extend(metrics)

    def has_artifact(self, run_id: str, name: str, source: Path | None) -> bool:
        files = dict(self._server.runs[run_id].files)
        return name in files and (source is None or len(files[name]) == source.stat().st_size)

    def upload(self, run_id: str, source: Path) -> None:
        run = self._server.runs[run_id]
        run.files = [pair for pair in run.files if pair[0] != source.name] + [(source.name, source.read_bytes())]
