"""The JSONL tracker: what is written can be read, after crashes too."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.errors import ConfigError, DataError
from burnish.track.jsonl import JsonlTracker, read_runs


def test_run_is_read_back_as_it_was_tracked(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "deep" / "track.jsonl")
    tracker.start("first")
    tracker.params({"rank": 16, "model": "größe", "path": Path("a/b"), "betas": (0.9, 0.999)})
    tracker.params({"rank": 8})
    tracker.metrics({"loss": 2.5, "tokens": 10}, step=1)
    tracker.metrics({"loss": 1.25}, step=2)
    tracker.metrics({"score": 0.9})
    tracker.artifact(tmp_path / "adapter")
    tracker.finish("finished")
    (run,) = read_runs(tracker.path)
    assert run.name == "first"
    assert run.params == {"rank": 8, "model": "größe", "path": "a/b", "betas": [0.9, 0.999]}
    assert run.series("loss") == [(1, 2.5), (2, 1.25)]
    assert run.series("score") == [(None, 0.9)]
    assert run.artifacts == [str(tmp_path / "adapter")]
    assert run.status == "finished"


def test_lines_are_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "t.jsonl", clock=lambda: 12.3456)
    tracker.start("r")
    tracker.metrics({"loss": 1.0}, step=1)
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert lines == [
        {"event": "start", "run": "r", "time": 12.346},
        {"event": "metrics", "run": "r", "time": 12.346, "step": 1, "metrics": {"loss": 1.0}},
    ]
    tracker.finish("failed")


KILLED = """
import os, signal, sys
from pathlib import Path
from burnish.track.jsonl import JsonlTracker
tracker = JsonlTracker(Path(sys.argv[1]))
tracker.start("r")
for step in range(100):
    tracker.metrics({"loss": 100.0 - step}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_process_loses_no_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    result = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, timeout=60, env=dict(os.environ))
    assert result.returncode == -signal.SIGKILL
    (run,) = read_runs(path)
    assert len(run.series("loss")) == 100
    assert run.status is None


def test_line_cut_by_a_crash_is_passed_over_and_the_next_run_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    tracker = JsonlTracker(path)
    tracker.start("a")
    tracker.metrics({"loss": 1.0}, step=1)
    tracker.finish("finished")
    path.write_bytes(path.read_bytes()[:-30])
    tracker.start("b")
    tracker.metrics({"loss": 2.0}, step=1)
    tracker.finish("finished")
    first, second = read_runs(path)
    assert (first.name, first.status) == ("a", None)
    assert second.series("loss") == [(1, 2.0)]
    assert second.status == "finished"


def test_runs_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "t.jsonl")
    for loss in (1.0, 2.0):
        tracker.start("same")
        tracker.metrics({"loss": loss})
        tracker.finish("finished")
    assert [run.series("loss") for run in read_runs(tracker.path)] == [[(None, 1.0)], [(None, 2.0)]]


def test_numbers_without_json_come_back(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "t.jsonl")
    tracker.start("r")
    tracker.params({"note": "NaN"})
    tracker.metrics({"a": math.nan, "b": math.inf, "c": -math.inf})
    tracker.finish("failed")
    (run,) = read_runs(tracker.path)
    _, figures = run.metrics[0]
    assert math.isnan(figures["a"])
    assert (figures["b"], figures["c"]) == (math.inf, -math.inf)
    assert run.params == {"note": "NaN"}


def test_scalars_of_arrays_are_written_as_numbers(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    tracker = JsonlTracker(tmp_path / "t.jsonl")
    tracker.start("r")
    tracker.metrics({"loss": numpy.float32(0.5), "count": numpy.int64(3)})
    tracker.finish("finished")
    assert read_runs(tracker.path)[0].metrics == [(None, {"loss": 0.5, "count": 3})]


def test_nothing_may_come_before_start_or_after_finish(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "t.jsonl")
    with pytest.raises(ConfigError, match="no run"):
        tracker.metrics({"loss": 1.0})
    tracker.start("r")
    tracker.finish("finished")
    with pytest.raises(ConfigError, match="no run"):
        tracker.metrics({"loss": 1.0})


def test_folder_in_the_way_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        JsonlTracker(tmp_path).start("r")


def test_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_runs(tmp_path / "none.jsonl")
