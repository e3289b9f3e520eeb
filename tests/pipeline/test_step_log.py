"""steps.jsonl: readable while it grows, whole after a crash, continued by a resumed run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from burnish.errors import DataError
from burnish.pipeline.step_log import StepLog, read_step_log
from burnish.train.results import EvalRecord, StepRecord


def record(step: int, *, loss: float = 1.0) -> StepRecord:
    return StepRecord(
        step=step, loss=loss, tokens=40, label_tokens=20, seconds=0.5, learning_rate=1e-3, grad_norm=0.5,
        phases={"forward": 0.2}, memory={"forward": {"weights": 7}},
    )  # fmt: skip


def test_lines_are_there_while_the_run_goes_on(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "run" / "steps.jsonl")
    assert not (tmp_path / "run").exists(), "a run that fails before its first step leaves nothing"
    log.step(record(1))
    (line,) = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    read = json.loads(line)
    assert read["event"] == "step"
    assert (read["loss"], read["tokens_per_s"], read["memory"]) == (1.0, 80.0, {"forward": {"weights": 7}})
    log.evaluation(EvalRecord(step=1, loss=2.0, seconds=0.1, figures={"score": 0.5}))
    log.saving(1, tmp_path / "step-1", 0.2)
    events = [(line["event"], line["step"]) for line in read_step_log(log.path)]
    assert events == [("step", 1), ("evaluation", 1), ("saving", 1)]
    log.close()


def test_loss_that_is_not_a_number_is_null(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps.jsonl")
    log.step(record(1, loss=math.nan))
    log.close()
    assert "NaN" not in log.path.read_text()
    assert read_step_log(log.path)[0]["loss"] is None


def test_resumed_run_drops_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    first = StepLog(tmp_path / "steps.jsonl")
    for step in range(1, 6):
        first.step(record(step, loss=float(step)))
    first.close()
    with first.path.open("ab") as file:
        file.write(b'{"event":"step","step":6,"lo')
    second = StepLog(first.path, after_step=3)
    second.step(record(4, loss=40.0))
    second.close()
    assert [line["loss"] for line in read_step_log(first.path)] == [1.0, 2.0, 3.0, 40.0]
    fresh = StepLog(first.path)
    fresh.step(record(1))
    fresh.close()
    assert len(read_step_log(first.path)) == 1


def test_disk_that_fails_stops_the_log_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = StepLog(tmp_path / "file" / "steps.jsonl")
    log.step(record(1))
    log.step(record(2))
    assert log.broken is not None
    assert "cannot be written" in log.broken
    log.close()
    with pytest.raises(DataError, match="cannot be read"):
        read_step_log(tmp_path / "missing.jsonl")


def test_a_full_disk_is_noted_also_when_the_file_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, line: bytes) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    log = StepLog(tmp_path / "steps.jsonl")
    monkeypatch.setattr(log, "_open", Full)
    log.step(record(1))
    log.close()
    assert "No space left on device; the run goes on without it" in str(log.broken)
