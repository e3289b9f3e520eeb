"""A trace of a few steps that browsers' viewers can read, and the operators that cost most."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from burnish.train.profile import StepClock
from burnish.train.trace import TraceRecorder

CPU = torch.device("cpu")


def run(path: Path, *, total_steps: int, taken: int | None = None) -> TraceRecorder:
    """Steps of one product each, `step` of them as large as its number says."""
    recorder, clock = TraceRecorder(path, total_steps=total_steps, device=CPU), StepClock()
    recorder.start()
    for step in range(1, (taken or total_steps) + 1):
        with clock.mark("forward"):
            torch.ones(step, 4) @ torch.ones(4, 4)
        recorder.step_done()
    recorder.close()
    return recorder


@pytest.mark.parametrize(
    ("total", "taken", "traced"), [(8, None, 3), (4, None, 3), (2, None, 2), (1, None, 1), (8, 4, 2)]
)
def test_trace_covers_a_few_steps_after_the_warm_up(tmp_path: Path, total: int, taken: int | None, traced: int) -> None:
    recorder = run(tmp_path / "trace.json", total_steps=total, taken=taken)
    assert recorder.written
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = [event for event in events if event.get("ph") == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 and "pid" in event and "tid" in event for event in named)
    assert sum(event["name"] == "aten::mm" for event in named) == traced
    assert sum(event["name"] == "forward" for event in named) == traced
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_operators_are_listed_dearest_first_without_our_phases(tmp_path: Path) -> None:
    operators = run(tmp_path / "trace.json", total_steps=5).operators
    assert "aten::mm" in {operator.name for operator in operators}
    assert "forward" not in {operator.name for operator in operators}
    assert [operator.seconds for operator in operators] == sorted((o.seconds for o in operators), reverse=True)
    assert sum(operator.share for operator in operators) == pytest.approx(1)


def test_run_that_ends_before_the_warm_up_leaves_no_file(tmp_path: Path) -> None:
    recorder = run(tmp_path / "trace.json", total_steps=9, taken=1)
    assert not recorder.written
    assert list(tmp_path.iterdir()) == []
