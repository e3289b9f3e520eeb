"""The plots of training: drawn from what a run recorded, and left out where it recorded nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from burnish.measure.report_html import render_html
from burnish.measure.report_training import (
    learning_rate,
    loss_curve,
    memory_by_component,
    throughput,
    time_split,
    training_plots,
)
from burnish.measure.run_record import LossPoint, RunRecord, Stage, TrainingPoint

MIB = 1024**2


@pytest.fixture
def trained() -> RunRecord:
    """Forty steps, with an evaluation half-way and at the end."""
    points = [
        TrainingPoint(
            step=step,
            learning_rate=1e-3 * (1 - step / 50),
            grad_norm=1.0,
            tokens_per_s=300.0 + step,
            phases={"data": 0.1, "forward": 0.9, "backward": 2.0, "evaluation": 1.0 if step in (21, 40) else 0.0},
            memory={"weights": 500 * MIB, "gradients": 20 * MIB, "activations": 100 * MIB, "other": step * MIB},
        )
        for step in range(1, 41)
    ]
    return RunRecord(
        name="tune",
        created="2026-11-21T09:14:03+00:00",
        stages=[Stage(name="tune", seconds=120.0, predicted_peak_bytes=700 * MIB, measured_peak_bytes=660 * MIB)],
        loss=[LossPoint(step=step, loss=3.0 / step) for step in range(1, 41)],
        eval_loss=[LossPoint(step=20, loss=0.3), LossPoint(step=40, loss=0.2)],
        training=points,
    )


def test_record_keeps_the_profile(trained: RunRecord) -> None:
    assert RunRecord.from_dict(trained.to_dict()) == trained


def test_every_plot_says_in_words_what_it_shows(trained: RunRecord) -> None:
    plots = {plot.name: plot for plot in training_plots(trained)}
    assert list(plots) == ["loss", "training-memory", "tokens-per-s", "learning-rate", "time-split"]
    assert "held out 0.200 at step 40" in plots["loss"].description
    assert "weights 500 MiB" in plots["training-memory"].description
    assert "Predicted peak 700 MiB" in plots["training-memory"].description
    assert "Median 321, least 301" in plots["tokens-per-s"].description
    assert "at the end 0.0002" in plots["learning-rate"].description
    assert "backward 65.6 %" in plots["time-split"].description
    assert [words for _, words in plots["training-memory"].key] == [
        "weights", "gradients", "activations", "other", "predicted peak",
    ]  # fmt: skip
    assert plots["time-split"].key[0] == ("layer-1", "data 3.3 %")


def test_page_shows_the_plots_with_their_keys(trained: RunRecord) -> None:
    page = render_html(trained)
    assert page.count("<svg") == 6, "memory of the stage, and five of training"
    assert '<i class="layer-3"></i>activations' in page
    assert "var(--layer-3)" in page
    assert "#01030" not in page
    assert "Tuned for 40 steps" in page
    assert page == render_html(trained)


def test_plots_without_figures_are_left_out(trained: RunRecord) -> None:
    bare = replace(trained, training=[TrainingPoint(step=step) for step in (1, 2, 3)])
    for draw in (learning_rate, memory_by_component, throughput, time_split):
        assert draw(bare) is None
    assert loss_curve(replace(trained, loss=[])) is None
    assert [plot.name for plot in training_plots(bare)] == ["loss"]
    assert "Predicted" not in memory_by_component(replace(trained, stages=[])).description
