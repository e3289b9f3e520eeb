"""What the bar, the log, the tracker and the trace are told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.pipeline.step_log import read_step_log
from burnish.pipeline.tune_watch import TuneWatch
from burnish.train.results import EvalRecord, StepRecord

MIB = 2**20


class Shown:
    """A progress bar that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, int, str]] = []

    def __call__(self, label: str, done: int, total: int, note: str = "") -> None:
        self.lines.append((done, total, note))


class Notebook:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def start(self, run: str, *, resumed: bool = False) -> None:
        self.lines.append(("start", run, resumed))

    def params(self, params: Mapping[str, Any]) -> None:
        self.lines.append(("params", dict(params)))

    def metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        self.lines.append(("metrics", step, dict(metrics)))

    def artifact(self, path: Path) -> None:
        self.lines.append(("artifact", path.name))

    def finish(self, status: str) -> None:
        self.lines.append(("finish", status))


def record(step: int, loss: float) -> StepRecord:
    return StepRecord(
        step=step, loss=loss, tokens=680, label_tokens=20, seconds=2.0, learning_rate=1e-3, grad_norm=0.5,
        memory={"forward": {"weights": 500 * MIB, "other": 12 * MIB}, "step": {"weights": 500 * MIB}},
    )  # fmt: skip


def watch_of(folder: Path, progress: Any, **settings: Any) -> TuneWatch:
    return TuneWatch(folder, label="Tuning", total_steps=10, progress=progress, **settings)


def test_bar_shows_loss_speed_memory_and_what_else_is_being_done(tmp_path: Path) -> None:
    shown = Shown()
    watch = watch_of(tmp_path, shown)
    watch.on_step(record(1, 3.0))
    watch.on_step(record(2, 2.0))
    note = "loss 2.500, 340 tokens/s, 512 MiB"
    assert shown.lines[-1] == (2, 10, note)
    with watch.clock.mark("evaluation"):
        assert shown.lines[-1] == (2, 10, f"{note}, evaluating")
    watch.on_evaluation(EvalRecord(step=2, loss=2.2, seconds=0.1))
    assert shown.lines[-1] == (2, 10, note)
    with watch.clock.mark("saving"):
        assert shown.lines[-1][2] == f"{note}, saving"
    with watch, watch.saving(tmp_path):
        assert shown.lines[-1][2] == f"{note}, saving"
    assert [line["event"] for line in read_step_log(watch.log.path)] == ["step", "step", "evaluation", "saving"]


def test_bar_follows_the_time_budget(tmp_path: Path) -> None:
    shown = Shown()
    watch = watch_of(tmp_path, shown, max_seconds=4.0)
    with watch:
        watch.on_step(record(1, 3.0))
        watch.on_step(record(2, 3.0))
    assert [done for done, _, _ in shown.lines] == [5, 10]


def test_tracker_hears_params_steps_evaluations_and_the_end(tmp_path: Path) -> None:
    book = Notebook()
    watch = watch_of(tmp_path, Shown(), tracker=book)
    with watch:
        watch.begin_tracking("adapter", {"model": "m", "train": {"steps": 10, "lora": {"rank": 4}}})
        watch.on_step(record(1, 3.0))
        watch.on_evaluation(EvalRecord(step=1, loss=2.0, seconds=0.1, figures={"score": 0.5}))
        watch.on_evaluation(EvalRecord(step=2, loss=None, seconds=0.1))
    (tmp_path / "burnish.json").write_text("{}")
    watch.end_tracking({"seconds": 2, "predicted": None}, interrupted=True)
    assert book.lines[:2] == [
        ("start", "adapter", False),
        ("params", {"model": "m", "train.steps": 10, "train.lora.rank": 4}),
    ]
    _, step, figures = book.lines[2]
    assert step == 1
    assert figures.keys() == {"loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_bytes"}
    assert book.lines[3:] == [
        ("metrics", 1, {"eval_loss": 2.0, "score": 0.5}),
        ("metrics", 2, {}),
        ("metrics", None, {"seconds": 2.0}),
        ("artifact", "burnish.json"),
        ("artifact", "steps.jsonl"),
        ("finish", "interrupted"),
    ]


def test_run_too_short_for_a_trace_says_so(tmp_path: Path) -> None:
    watch = watch_of(tmp_path, Shown(), trace=torch.device("cpu"))
    with watch:
        watch.on_step(record(1, 3.0))
    assert watch.trace_path is None
    assert watch.operators() == []
    assert watch.notes() == ["no trace: the run ended before a step could be recorded"]
    assert watch_of(tmp_path, Shown()).notes() == []


@pytest.mark.parametrize(("error", "status"), [(ValueError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_error_ends_tracking_with_what_it_was(tmp_path: Path, error: type[BaseException], status: str) -> None:
    book = Notebook()
    with pytest.raises(error), watch_of(tmp_path, Shown(), tracker=book):
        raise error
    assert book.lines == [("finish", status)]
