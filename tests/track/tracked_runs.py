"""A short tuning run that is tracked, and whether MLflow has all of it once."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from burnish.pipeline.examples import DataConfig
from burnish.pipeline.opening import Source
from burnish.pipeline.step_log import read_step_log
from burnish.pipeline.tune import TuneRecord, tune
from burnish.track.destination import parse_destination
from burnish.track.jsonl import read_runs
from burnish.track.making import make_tracker
from burnish.track.mlflow_api import Mlflow
from burnish.track.spool import EVENTS_NAME, SpoolState, find_spools, first_event, read_state
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig

STEPS = 10
AtStep = Callable[[int], None]


def tuned(
    model: Path, rows: Path, out: Path, uri: str | None, *, at_step: AtStep | None = None, say: Any = print
) -> TuneRecord:
    """Tune a tiny model; the same result every time."""

    def progress(label: str, done: int, total: int, note: str = "") -> None:
        if at_step is not None and label.startswith("Tuning"):
            at_step(done)

    return tune(
        str(model),
        data=DataConfig(source=str(rows)),
        out=out,
        lora=LoraConfig(rank=4, alpha=8),
        config=TrainConfig(steps=STEPS, micro_batch_size=4, learning_rate=5e-3, precision="float32"),
        source=Source(dtype="float32"),
        tracker=make_tracker(uri, beside=out, warn=say),
        progress=progress,
    )


def result_hash(out: Path) -> str:
    """Of what was learned."""
    return hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()


def state_of(out: Path, uri: str) -> SpoolState:
    """How far the run's spool is sent."""
    spools = find_spools(out)
    return read_state(spools[-1], parse_destination(uri).name) if spools else SpoolState()


def until(true: Callable[[], Any], *, seconds: float = 240) -> None:
    """Wait for something that has to happen."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.05)


def check_whole(out: Path, uri: str) -> Any:
    """MLflow has the run once, each figure once, and all that the local records hold; returns its run."""
    mlflow = Mlflow(parse_destination(uri))
    (spool,) = find_spools(out)
    experiment = mlflow.client.get_experiment_by_name(parse_destination(uri).experiment)
    key = first_event(spool)["key"]
    found = mlflow.client.search_runs([experiment.experiment_id], f"tags.`burnish.key` = '{key}/run'")
    assert len(found) == 1
    run = found[0]
    assert run.info.status == "FINISHED"
    local = next(each for each in read_runs(spool / EVENTS_NAME) if each.name == "run")
    expected: dict[str, list[tuple[int, float]]] = {}
    for step, figures in local.metrics:
        for name, value in figures.items():
            expected.setdefault(name, []).append((step or 0, value))
    assert set(run.data.metrics) == expected.keys()
    for name, values in expected.items():
        there = sorted((one.step, one.value) for one in mlflow.client.get_metric_history(run.info.run_id, name))
        assert there == sorted(values), name
    losses = [(line["step"], line["loss"]) for line in read_step_log(out / "steps.jsonl") if line["event"] == "step"]
    assert sorted(expected["loss"]) == losses
    assert len(losses) == STEPS
    manifest = json.loads((out / "burnish.json").read_text())
    assert run.data.metrics["peak_memory_bytes"] == manifest["figures"]["peak_memory_bytes"]
    assert math.isclose(float(run.data.params["train.learning_rate"]), manifest["config"]["train"]["learning_rate"])
    assert {name: str(value) for name, value in local.params.items()}.items() <= run.data.params.items()
    files = {one.path: one.file_size for one in mlflow.client.list_artifacts(run.info.run_id)}
    assert files["burnish.json"] == (out / "burnish.json").stat().st_size
    assert {"run.json", "steps.jsonl"} <= files.keys()
    return run


def check_model(out: Path, uri: str, registered: str) -> str:
    """One logged model of the run and one registered version; its URI."""
    mlflow = Mlflow(parse_destination(uri))
    run = check_whole(out, uri)
    models = mlflow.client.search_logged_models([run.info.experiment_id])
    assert [model.source_run_id for model in models].count(run.info.run_id) == 1
    versions = mlflow.client.search_model_versions(f"name = '{registered}' and run_id = '{run.info.run_id}'")
    assert len(versions) == 1
    return f"models:/{registered}/{versions[0].version}"
