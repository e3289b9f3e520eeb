"""What --track takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.errors import ConfigError
from burnish.track.guarded import GuardedTracker
from burnish.track.jsonl import JsonlTracker, read_runs
from burnish.track.making import make_tracker
from burnish.track.null import NullTracker
from burnish.track.protocol import Tracker


@pytest.mark.parametrize("uri", [None, "", "none"])
def test_no_uri_tracks_nothing(uri: str | None) -> None:
    tracker = make_tracker(uri)
    assert isinstance(tracker, NullTracker)
    assert isinstance(tracker, Tracker)


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("runs/t.jsonl", "runs/t.jsonl"),
        ("/tmp/t.jsonl", "/tmp/t.jsonl"),
        ("jsonl:runs/t.txt", "runs/t.txt"),
        ("jsonl:/a/t", "/a/t"),
        ("jsonl:///a/t%20x", "/a/t x"),
        ("file:///a/t.jsonl", "/a/t.jsonl"),
        ("file://localhost/a/t.jsonl", "/a/t.jsonl"),
    ],
)
def test_uri_names_a_file(uri: str, path: str) -> None:
    tracker = make_tracker(uri)
    assert isinstance(tracker, GuardedTracker)
    assert isinstance(tracker.tracker, JsonlTracker)
    assert tracker.tracker.path == Path(path)


@pytest.mark.parametrize("uri", ["ftp://x/t.jsonl", "wandb", "jsonl:", "file://elsewhere/t.jsonl", "runs"])
def test_unknown_uri_is_refused_before_the_run(uri: str) -> None:
    with pytest.raises(ConfigError, match="jsonl"):
        make_tracker(uri)


def test_unwritable_file_does_not_stop_a_run(tmp_path: Path) -> None:
    lines: list[str] = []
    tracker = make_tracker(f"jsonl:{tmp_path}", warn=lines.append)
    tracker.start("r")
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.finish("finished")
    assert len(lines) == 1
    assert "cannot be written" in lines[0]


def test_made_tracker_writes_a_run(tmp_path: Path) -> None:
    tracker = make_tracker(str(tmp_path / "t.jsonl"))
    tracker.start("r")
    tracker.finish("interrupted")
    assert read_runs(tmp_path / "t.jsonl")[0].status == "interrupted"
