"""What a tuning run leaves behind besides its result: steps.jsonl, run.json, a trace, and what a tracker was told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.measure.report import read_run, render
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.opening import Source
from burnish.pipeline.step_log import read_step_log
from burnish.pipeline.tune import TuneRecord, tune
from burnish.track.jsonl import read_runs
from burnish.track.making import make_tracker
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig
from burnish.train.profile import COMPONENTS

CONFIG = TrainConfig(steps=6, micro_batch_size=4, learning_rate=5e-3, precision="float32", eval_every=3)


@pytest.fixture(scope="module")
def record(tiny: Path, rows_file: Path, held_out_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TuneRecord:
    """Six steps with two evaluations, traced and tracked."""
    folder = tmp_path_factory.mktemp("recorded")
    return tune(
        str(tiny),
        data=DataConfig(source=str(rows_file)),
        eval_data=str(held_out_file),
        out=folder / "out",
        lora=LoraConfig(rank=4, alpha=8),
        config=CONFIG,
        source=Source(dtype="float32"),
        tracker=make_tracker(str(folder / "track.jsonl")),
        profile=True,
    )


def test_log_has_a_line_for_everything_that_happened(record: TuneRecord) -> None:
    lines = read_step_log(Path(record.adapter) / "steps.jsonl")
    expected = ["step"] * 3 + ["evaluation"] + ["step"] * 3 + ["evaluation", "saving"]
    assert [line["event"] for line in lines] == expected
    steps = [line for line in lines if line["event"] == "step"]
    assert [step["loss"] for step in steps] == [step["loss"] for step in record.steps]
    for step in steps:
        assert {"data", "forward", "backward", "optimizer"} <= step["phases"].keys()
        assert step["phases"]["forward"] > 0
        assert list(step["memory"]) == ["forward", "backward", "step"]
        assert step["memory"]["forward"]["activations"] > 0
        assert step["flops_per_s"] > 0
        assert step["peak_share"] is None, "nobody has measured what this processor can do"
    assert "evaluation" in steps[3]["phases"]
    assert "evaluation" not in steps[2]["phases"]


def test_memory_is_predicted_beside_measured_by_component(record: TuneRecord) -> None:
    assert tuple(record.component_bytes) == tuple(record.predicted_components) == COMPONENTS
    assert record.predicted_peak_bytes == sum(record.predicted_components.values())
    assert sum(record.component_bytes.values()) >= record.peak_memory_bytes
    for part in ("gradients", "optimizer"):
        assert record.component_bytes[part] == pytest.approx(record.predicted_components[part], rel=0.02)
    assert {"forward", "backward", "evaluation", "saving"} <= record.phase_seconds.keys()


def test_run_is_ready_for_a_report(record: TuneRecord) -> None:
    run = read_run(record.adapter)
    assert [point.step for point in run.training] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in run.eval_loss] == [3, 6]
    page = render(run, format="html")
    for title in ("Training loss", "Memory while training", "Training speed", "Learning rate", "Where the time went"):
        assert title in page


def test_trace_is_written_and_read(record: TuneRecord) -> None:
    assert record.trace == str(Path(record.adapter) / "trace.json")
    events = json.loads(Path(record.trace).read_text())["traceEvents"]
    assert sum(event["name"] == "optimizer" for event in events) == 3
    assert record.operators[0]["share"] > 0


def test_tracker_has_the_whole_run(record: TuneRecord) -> None:
    (run,) = read_runs(Path(record.adapter).parent / "track.jsonl")
    assert run.params["train.learning_rate"] == 5e-3
    assert run.params["lora.rank"] == 4
    assert [step for step, _ in run.series("loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in run.series("eval_loss")] == [3, 6]
    assert run.series("peak_memory_bytes") == [(None, record.peak_memory_bytes)]
    assert {"burnish.json", "run.json", "steps.jsonl", "trace.json"} <= {Path(path).name for path in run.artifacts}
    assert run.status == "finished"


def test_resumed_run_goes_on_in_the_same_log(tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    pressed: list[int] = []

    def press_ctrl_c(label: str, done: int, total: int, note: str = "") -> None:
        if done == 3 and not pressed:
            pressed.append(done)
            raise KeyboardInterrupt

    def run() -> TuneRecord:
        return tune(
            str(tiny),
            data=DataConfig(source=str(rows_file)),
            out=tmp_path / "out",
            lora=LoraConfig(rank=2, alpha=4),
            config=TrainConfig(steps=6, micro_batch_size=4, precision="float32"),
            source=Source(dtype="float32"),
            progress=press_ctrl_c,
        )

    assert run().interrupted
    done = run()
    assert done.resumed_from == 3
    lines = [line for line in read_step_log(tmp_path / "out" / "steps.jsonl") if line["event"] == "step"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in read_run(tmp_path / "out").training] == [1, 2, 3, 4, 5, 6]
