"""The plots of a training run: loss, learning rate, tokens per second, memory by component, where the time went.

Torch-free. What is drawn comes from the run record's `loss`, `eval_loss` and `training`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from burnish.measure.formatting import format_bytes, format_rate, format_seconds, format_share, is_missing
from burnish.measure.report_drawing import (
    ACCENT,
    HEIGHT,
    LAYERS,
    MEBI,
    MUTED,
    SECOND,
    SURFACE,
    Plot,
    blank_figure,
    finished_plot,
    name_height,
    style,
)
from burnish.measure.run_record import LossPoint, RunRecord, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOW = 2.4  # inches, of the plots that are looked at less


def training_plots(run: RunRecord) -> list[Plot]:
    """Every plot of training that the record has figures for."""
    makers: tuple[Callable[[RunRecord], Plot | None], ...] = (
        loss_curve,
        memory_by_component,
        throughput,
        learning_rate,
        time_split,
    )
    return [plot for plot in (make(run) for make in makers) if plot is not None]


def loss_curve(run: RunRecord) -> Plot | None:
    """Training loss by step, smoothed over it, and the held-out loss."""
    train, held_out = _finite(run.loss), _finite(run.eval_loss)
    if len(train) < 2:
        return None
    with style():
        figure, axes = blank_figure(height=HEIGHT)
        steps = [point.step for point in train]
        losses = [point.loss for point in train]
        smooth = _smoothed(losses)
        axes.plot(steps, losses, color=ACCENT, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smooth, color=ACCENT, linewidth=1.8)
        if held_out:
            axes.plot(
                [point.step for point in held_out],
                [point.loss for point in held_out],
                color=SECOND,
                linewidth=1.4,
                marker="o",
                markersize=4,
                markeredgecolor=SURFACE,
                markeredgewidth=0.8,
            )
        axes.set_xlim(min(steps), max(steps) + 0.02 * (max(steps) - min(steps)))
        top = max([*smooth, *(point.loss for point in held_out)])
        axes.set_ylim(0, 1.08 * top if top > 0 else 1.0)
        axes.set_xlabel("optimizer step")
        name_height(figure, axes, "loss, nats per token")
        words = f"From {losses[0]:.3f} at step {steps[0]} to {smooth[-1]:.3f} at step {steps[-1]}"
        words += f"; held out {held_out[-1].loss:.3f} at step {held_out[-1].step}." if held_out else "."
        return finished_plot(figure, name="loss", title="Training loss", description=f"Training loss. {words}")


def learning_rate(run: RunRecord) -> Plot | None:
    """Learning rate by step."""
    points = [(point.step, point.learning_rate) for point in run.training if not is_missing(point.learning_rate)]
    if len(points) < 2:
        return None
    steps, rates = [step for step, _ in points], [rate or 0.0 for _, rate in points]
    with style():
        figure, axes = blank_figure(height=_LOW)
        exponent = math.floor(math.log10(max(rates))) if max(rates) > 0 else 0
        scaled = [rate / 10.0**exponent for rate in rates]
        axes.plot(steps, scaled, color=ACCENT, linewidth=1.6)
        axes.set_ylim(0, 1.08 * (max(scaled) or 1.0))
        _step_axis(axes, steps)
        name_height(figure, axes, f"learning rate, 1e{exponent}" if exponent else "learning rate")
        words = f"Learning rate. Highest {max(rates):.3g}, at the end {rates[-1]:.3g}."
        return finished_plot(figure, name="learning-rate", title="Learning rate", description=words)


def throughput(run: RunRecord) -> Plot | None:
    """Tokens per second by step, smoothed over it."""
    points = [(point.step, point.tokens_per_s) for point in run.training if not is_missing(point.tokens_per_s)]
    if len(points) < 2:
        return None
    steps, rates = [step for step, _ in points], [rate or 0.0 for _, rate in points]
    smooth = _smoothed(rates)
    with style():
        figure, axes = blank_figure(height=_LOW, left=0.15)
        axes.plot(steps, rates, color=ACCENT, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smooth, color=ACCENT, linewidth=1.8)
        axes.set_ylim(0, 1.08 * (max(rates) or 1.0))
        _step_axis(axes, steps)
        name_height(figure, axes, "tokens/s")
        middle = sorted(rates)[len(rates) // 2]
        words = f"Tokens per second. Median {format_rate(middle)}, least {format_rate(min(rates))}."
        return finished_plot(figure, name="tokens-per-s", title="Training speed", description=words)


def memory_by_component(run: RunRecord) -> Plot | None:
    """What the run held after its largest forward passes, components on each other, under the predicted peak."""
    points = [point for point in run.training if point.memory]
    if len(points) < 2:
        return None
    names = _names(point.memory for point in points)
    steps = [point.step for point in points]
    predicted = _predicted(run.stages)
    highest = max(max(sum(point.memory.values()) for point in points), predicted or 0) or 1
    unit, unit_name = (1024**3, "GiB") if highest >= 2 * 1024**3 else (MEBI, "MiB")
    layers = [[point.memory.get(name, 0) / unit for point in points] for name in names]
    with style():
        figure, axes = blank_figure(height=HEIGHT)
        axes.stackplot(steps, layers, colors=LAYERS[: len(names)], linewidth=0, alpha=0.85)
        if predicted is not None:
            axes.axhline(predicted / unit, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 1.12 * highest / unit)
        _step_axis(axes, steps)
        name_height(figure, axes, f"memory, {unit_name}")
        last = points[-1].memory
        words = ", ".join(f"{name} {format_bytes(last.get(name, 0))}" for name in names)
        end = f" Predicted peak {format_bytes(predicted)}." if predicted is not None else ""
        key = [(f"layer-{number}", name) for number, name in enumerate(names, 1)]
        return finished_plot(
            figure,
            name="training-memory",
            title="Memory while training",
            description=f"Memory while training, at the last step: {words}.{end}",
            key=(*key, *([("hollow", "predicted peak")] if predicted is not None else [])),
        )


def time_split(run: RunRecord) -> Plot | None:
    """Share of the training time by phase: one bar."""
    names = _names(point.phases for point in run.training)
    spent = {name: math.fsum(point.phases.get(name, 0.0) for point in run.training) for name in names}
    spent = {name: seconds for name, seconds in spent.items() if seconds > 0}
    total = math.fsum(spent.values())
    if not total:
        return None
    with style():
        figure, axes = blank_figure(height=1.25, left=0.02)
        left = 0.0
        for color, seconds in zip(LAYERS, spent.values()):
            axes.barh(0, 100 * seconds / total, left=left, height=0.8, color=color, edgecolor=SURFACE, linewidth=0.8)
            left += 100 * seconds / total
        axes.set_xlim(0, 103)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.set_xlabel("share of the time, %")
        shares = [(name, format_share(seconds / total)) for name, seconds in spent.items()]
        words = "; ".join(f"{name} {share}" for name, share in shares)
        return finished_plot(
            figure,
            name="time-split",
            title="Where the time went",
            description=f"Time of the steps: {words}; {format_seconds(total)} altogether.",
            key=tuple((f"layer-{number}", f"{name} {share}") for number, (name, share) in enumerate(shares, 1)),
        )


def _predicted(stages: Sequence[Stage]) -> int | None:
    return next((stage.predicted_peak_bytes for stage in stages if stage.name.split("/")[-1] == "tune"), None)


def _names(parts: Iterable[Mapping[str, float]]) -> list[str]:
    """Names in the order in which they first come, and what has no name of its own last."""
    return sorted(dict.fromkeys(name for part in parts for name in part), key=lambda name: name == "other")


def _step_axis(axes: Axes, steps: Sequence[int]) -> None:
    axes.set_xlim(min(steps), max(steps) + 0.03 * (max(steps) - min(steps)))
    axes.set_xlabel("optimizer step")


def _finite(points: Sequence[LossPoint]) -> list[LossPoint]:
    return [point for point in points if not is_missing(point.loss)]


def _smoothed(values: Sequence[float]) -> list[float]:
    """A centred mean over a twentieth of the run; near the ends over as much as both sides have, so that none lags."""
    half = len(values) // 40
    result = []
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        around = values[place - reach : place + reach + 1]
        result.append(math.fsum(around) / len(around))
    return result
