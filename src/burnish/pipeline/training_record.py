"""A tuning run as the run record has it: its stage, its losses and its profile, thinned where a run is long."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

import torch

from burnish.measure.hardware import hardware_record, version_record
from burnish.measure.run_record import LossPoint, RunRecord, Stage, TrainingPoint

MOST_POINTS = 600  # more than a plot has pixels for
_Item = TypeVar("_Item")


def tune_run(record: Mapping[str, Any], *, parameters: int, data: str, settings: Mapping[str, Any]) -> RunRecord:
    """A run that did nothing but tune, for `burnish report`.

    Args:
        record: the tune record as a mapping.
        parameters: of the base.
        data: where the rows came from.
        settings: resolved, by group.
    """
    return RunRecord(
        name="tune",
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        model=record["base"],
        parameters=parameters,
        data=data,
        seconds=record["seconds"],
        hardware={**hardware_record(), "threads": torch.get_num_threads(), "device": record["device"]},
        versions={**version_record(), "python": platform.python_version()},
        stages=[tune_stage(record)],
        loss=loss_points(record["steps"]),
        eval_loss=eval_points(record["evals"]),
        training=training_points(record["steps"]),
        settings=dict(settings),
    )


def tune_stage(record: Mapping[str, Any]) -> Stage:
    """The stage called "tune" of a tune record."""
    return Stage(
        name="tune",
        seconds=record["seconds"],
        predicted_peak_bytes=record["predicted_peak_bytes"],
        measured_peak_bytes=record["peak_memory_bytes"],
        components=dict(record["component_bytes"]),
        predicted_components=dict(record["predicted_components"]),
    )


def loss_points(steps: Sequence[Mapping[str, Any]]) -> list[LossPoint]:
    """Training loss by step; of several steps together the mean."""
    elapsed, points = 0.0, []
    for together in _together(steps):
        elapsed += math.fsum(step["seconds"] for step in together)
        loss = _mean(step["loss"] for step in together)
        if loss is not None:
            tokens = sum(step["tokens"] for step in together)
            points.append(LossPoint(step=together[-1]["step"], loss=loss, tokens=tokens, seconds=elapsed))
    return points


def eval_points(evals: Sequence[Mapping[str, Any]]) -> list[LossPoint]:
    """Held-out loss by step."""
    return [LossPoint(step=item["step"], loss=item["loss"]) for item in evals if item["loss"] is not None]


def training_points(steps: Sequence[Mapping[str, Any]]) -> list[TrainingPoint]:
    """Rates, times and memory by step; of several steps together means, sums and the most."""
    points = []
    for together in _together(steps):
        seconds = math.fsum(step["seconds"] for step in together)
        held = [step["memory"]["forward"] for step in together if step.get("memory", {}).get("forward")]
        phases: dict[str, float] = {}
        for step in together:
            for name, spent in step.get("phases", {}).items():
                phases[name] = phases.get(name, 0.0) + spent
        points.append(
            TrainingPoint(
                step=together[-1]["step"],
                learning_rate=_mean(step["learning_rate"] for step in together),
                grad_norm=_mean(step["grad_norm"] for step in together),
                tokens_per_s=sum(step["tokens"] for step in together) / seconds if seconds else None,
                phases=phases,
                memory=dict(max(held, key=lambda parts: sum(parts.values()))) if held else {},
            )
        )
    return points


def _together(steps: Sequence[_Item]) -> list[Sequence[_Item]]:
    size = -(-len(steps) // MOST_POINTS) if steps else 1
    return [steps[start : start + size] for start in range(0, len(steps), size)]


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(known) if known else None
