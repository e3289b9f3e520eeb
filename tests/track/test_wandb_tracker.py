"""Weights & Biases, as far as its interface goes: a stand-in for the package notes what it is called with."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from burnish.errors import ConfigError, MissingExtraError
from burnish.track.guarded import GuardedTracker
from burnish.track.making import make_tracker
from burnish.track.protocol import Tracker
from burnish.track.wandb_tracker import WandbTracker

Calls = list[tuple[str, Any]]


class Mapped:
    def __init__(self, calls: Calls, name: str) -> None:
        self.calls, self.name = calls, name

    def update(self, values: dict[str, Any], **options: Any) -> None:
        self.calls.append((self.name, values))


class Run:
    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.config, self.summary = Mapped(calls, "config"), Mapped(calls, "summary")

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.calls.append(("log", (step, values)))

    def log_artifact(self, artifact: Artifact) -> None:
        self.calls.append(("artifact", (artifact.name, artifact.type, artifact.files)))

    def finish(self, *, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


class Artifact:
    def __init__(self, name: str, *, type: str) -> None:
        self.name, self.type = name, type
        self.files: list[str] = []

    def add_file(self, path: str) -> None:
        self.files.append(path)

    def add_dir(self, path: str) -> None:
        self.files.append(f"{path}/*")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put the stand-in in the package's place; what it was called with."""
    noted: Calls = []
    module: Any = ModuleType("wandb")

    def init(**settings: Any) -> Run:
        noted.append(("init", settings))
        return Run(noted)

    module.init, module.Artifact, module.Settings = init, Artifact, dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    return noted


def test_run_goes_to_its_project(calls: Calls, tmp_path: Path) -> None:
    tracker = make_tracker("wandb://sql%20models")
    assert isinstance(tracker, Tracker)
    file = tmp_path / "burnish.json"
    file.write_text("{}")
    tracker.start("adapter")
    tracker.params({"rank": 16})
    tracker.metrics({"loss": 2.0}, step=7)
    tracker.metrics({"tokens_per_s": 300.0})
    tracker.artifact(file)
    tracker.artifact(tmp_path)
    tracker.finish("finished")
    settings = calls[0][1]
    assert (settings["project"], settings["name"], settings["id"]) == ("sql models", "adapter", None)
    assert settings["settings"] == {"silent": True, "console": "off"}
    assert calls[1:] == [
        ("config", {"rank": 16}),
        ("log", (7, {"loss": 2.0})),
        ("summary", {"tokens_per_s": 300.0}),
        ("artifact", ("burnish.json", "file", [str(file)])),
        ("artifact", (tmp_path.name, "model", [f"{tmp_path}/*"])),
        ("summary", {"status": "finished"}),
        ("finish", 0),
    ]


def test_named_run_goes_on_where_it_stopped(calls: Calls) -> None:
    tracker = make_tracker("wandb://models/my run")
    tracker.start("adapter")
    tracker.finish("interrupted")
    settings = calls[0][1]
    assert (settings["name"], settings["id"], settings["resume"]) == ("my run", "my-run", "allow")
    assert calls[-1] == ("finish", 130)


def test_failure_of_the_service_is_one_line(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: Any) -> Run:
        raise RuntimeError("api key not configured\n(no-tty)")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    lines: list[str] = []
    tracker = make_tracker("wandb://models", warn=lines.append)
    assert isinstance(tracker, GuardedTracker)
    assert isinstance(tracker.tracker, WandbTracker)
    tracker.start("adapter")
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.finish("finished")
    assert lines == [
        "tracking stopped at start: api key not configured (no-tty); the run goes on, and its own record is complete"
    ]


def test_missing_package_is_known_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match="wandb is not installed") as caught:
        make_tracker("wandb://models")
    assert "burnish[wandb]" in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["wandb:", "wandb://", "wandb:///run", "wandb:models", "wandb://a/b/c", "wandb://a?x=1"]
)
def test_uri_without_a_project_is_refused(calls: Calls, uri: str) -> None:
    with pytest.raises(ConfigError, match="wandb://PROJECT"):
        make_tracker(uri)
    assert not calls
