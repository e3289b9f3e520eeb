"""Curves of a run for its record: every step of a short run, buckets of a long one."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.pipeline.training_record import MOST_POINTS, eval_points, loss_points, training_points


def made(step: int, **changes: Any) -> dict[str, Any]:
    held = {"weights": 100, "activations": step}
    return {
        "step": step, "loss": float(step), "tokens": 10, "seconds": 0.5, "learning_rate": 0.1, "grad_norm": 1.0,
        "phases": {"forward": 0.2, "backward": 0.3}, "memory": {"forward": held, "step": {"weights": 100}}, **changes,
    }  # fmt: skip


def test_short_run_keeps_every_step() -> None:
    steps = [made(1), made(2, loss=None), made(3, memory={}, phases={})]
    assert [(point.step, point.loss, point.seconds) for point in loss_points(steps)] == [(1, 1.0, 0.5), (3, 3.0, 1.5)]
    points = training_points(steps)
    assert [point.step for point in points] == [1, 2, 3]
    assert points[1].memory == {"weights": 100, "activations": 2}
    assert points[2].memory == points[2].phases == {}
    assert points[0].tokens_per_s == 20.0


def test_long_run_is_thinned_without_losing_time_or_peaks() -> None:
    count = 4 * MOST_POINTS + 1
    steps = [made(step, tokens=0 if step % 2 else 20) for step in range(1, count + 1)]
    points = training_points(steps)
    assert len(points) <= MOST_POINTS
    assert points[-1].step == count
    assert sum(point.phases["backward"] for point in points) == pytest.approx(0.3 * count)
    assert points[0].memory["activations"] == points[0].step
    assert {point.tokens_per_s for point in points[:-1]} <= {16.0, 24.0}
    assert loss_points(steps)[0].loss == 3.0


def test_evaluations_without_a_loss_are_left_out() -> None:
    points = eval_points([{"step": 4, "loss": 0.5}, {"step": 8, "loss": None}])
    assert [(point.step, point.loss) for point in points] == [(4, 0.5)]
