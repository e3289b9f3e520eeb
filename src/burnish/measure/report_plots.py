"""The report's plots as inline SVG. Torch-free. Those of a training run are in `report_training.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from burnish.measure.formatting import format_bytes, format_column, format_rate, format_share
from burnish.measure.plot_labels import place_labels
from burnish.measure.report_drawing import (
    ACCENT,
    FAIL,
    FONT,
    HEIGHT,
    INK,
    MEBI,
    MUTED,
    SURFACE,
    WIDTH,
    Plot,
    blank_figure,
    finished_plot,
    style,
)
from burnish.measure.report_training import training_plots
from burnish.measure.run_record import RunRecord, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BREAK = 0.35  # an empty stretch of the score axis from which on it is broken


def draw_plots(run: RunRecord) -> list[Plot]:
    """Every plot that the record has figures for."""
    makers: tuple[Callable[[RunRecord], Plot | None], ...] = (
        quality_against_size,
        quality_against_speed,
        memory_per_stage,
    )
    return [*(plot for plot in (make(run) for make in makers) if plot is not None), *training_plots(run)]


def quality_against_size(run: RunRecord) -> Plot | None:
    """Score with its interval over disk size; None without two known points."""
    known = [(v, v.disk_bytes / MEBI, v.score) for v in run.variants if v.disk_bytes and v.score is not None]
    if len(known) < 2:
        return None
    words = "; ".join(f"{v.name} {format_share(v.score)} at {format_bytes(v.disk_bytes)}" for v, _, _ in known)
    return _score_scatter(run, known, name="quality-size", title="Quality against size", axis="disk, MiB", words=words)


def quality_against_speed(run: RunRecord) -> Plot | None:
    """Score with its interval over output tokens per second, at 8 requests at once where that is known for all."""
    at_8 = all(v.output_tokens_per_s_8 is not None for v in run.variants if v.score is not None)
    known = []
    for variant in run.variants:
        rate = variant.output_tokens_per_s_8 if at_8 else variant.output_tokens_per_s_1
        if rate is not None and variant.score is not None:
            known.append((variant, rate, variant.score))
    if len(known) < 2:
        return None
    words = "; ".join(f"{v.name} {format_share(v.score)} at {format_rate(rate)} tokens/s" for v, rate, _ in known)
    count = "8 requests at once" if at_8 else "one request"
    axis = f"output tokens/s, {count}"
    return _score_scatter(run, known, name="quality-speed", title="Quality against speed", axis=axis, words=words)


def _score_scatter(
    run: RunRecord,
    known: Sequence[tuple[Variant, float, float]],
    *,
    name: str,
    title: str,
    axis: str,
    words: str,
) -> Plot:
    with style():
        figure, whole = blank_figure(height=HEIGHT)
        parts = _score_axes(figure, whole, [variant for variant, _, _ in known])
        lowest, highest = min(x for _, x, _ in known), max(x for _, x, _ in known)
        room = max(0.18 * (highest - lowest), 0.06 * highest) or 1.0
        for axes in parts:
            axes.set_xlim(max(0.0, lowest - room), highest + room)
        parts[-1].set_xlabel(axis)
        figure.text(
            0.022, sum(whole.get_position().intervaly) / 2, f"{run.metric}, %", rotation=90, va="center", color=MUTED
        )
        blocks = []
        for variant, x, score in known:
            low, high = _interval(variant)
            axes = next((part for part in parts if part.get_ylim()[0] <= 100 * score), parts[-1])
            color = FAIL if variant.verdict == "fail" else MUTED if variant.parent is None else ACCENT
            axes.vlines(x, 100 * low, 100 * high, color=color, linewidth=2.4, alpha=0.4)
            marker = "X" if variant.verdict == "fail" else "o"
            axes.plot(
                [x], [100 * score], marker, color=color, markersize=7, markeredgecolor=SURFACE, zorder=3, clip_on=False
            )
            left, bottom = axes.transData.transform((x, 100 * low))
            _, top = axes.transData.transform((x, 100 * high))
            middle = axes.transData.transform((x, 100 * score))[1]
            blocks.append((left - 4, min(bottom, middle - 4), left + 4, max(top, middle + 4)))
        frame = figure.transFigure.transform([(whole.get_position().x0, 0), (1, 1)])
        bounds = (frame[0][0] + 2, parts[-1].bbox.y0, frame[1][0] - 2, parts[0].bbox.y1 + FONT)
        names = [variant.name for variant, _, _ in known]
        for text, (x, y) in zip(names, place_labels(names, blocks, bounds=bounds, font_size=FONT)):
            place = figure.transFigure.inverted().transform((x, y))
            figure.text(
                float(place[0]), float(place[1]), text, ha="left", va="baseline", color=INK, fontsize=FONT, zorder=4
            )
        return finished_plot(figure, name=name, title=title, description=f"{title}. {words}.")


def _interval(variant: Variant) -> tuple[float, float]:
    score = variant.score or 0.0
    low = score if variant.score_low is None else variant.score_low
    return low, score if variant.score_high is None else variant.score_high


def _score_axes(figure: Figure, whole: Axes, variants: Sequence[Variant]) -> list[Axes]:
    """One score axis, or two where a wide empty gap would flatten every difference; the break is drawn.

    Returns:
        the axes, the upper one first.
    """
    ends = sorted(_interval(variant) for variant in variants)
    gaps = [(ends[n + 1][0] - max(high for _, high in ends[: n + 1]), n + 1) for n in range(len(ends) - 1)]
    gap, cut = max(gaps, default=(0.0, 0))
    if gap < _BREAK or len(ends) - cut < 2:
        whole.set_ylim(-2, 106)
        whole.set_yticks(range(0, 101, 20))
        return [whole]
    upper, lower = ends[cut:], ends[:cut]
    floor = 5 * math.floor(20 * upper[0][0] - 0.2)
    ceiling = 5 * math.ceil(20 * max(high for _, high in upper) + 0.4)
    base = max(0, 5 * math.floor(20 * lower[0][0] - 0.2))
    place = whole.get_position()
    whole.remove()
    top = figure.add_axes((place.x0, place.y0 + 0.3 * place.height, place.width, 0.7 * place.height))
    bottom = figure.add_axes((place.x0, place.y0, place.width, 0.24 * place.height))
    top.set_ylim(floor, ceiling)
    bottom.set_ylim(base - 2, 5 * math.ceil(20 * max(high for _, high in lower) + 0.4))
    step = 5 if ceiling - floor <= 30 else 10
    top.set_yticks(range(step * math.ceil((floor + 1) / step), min(ceiling, 100) + 1, step))
    bottom.set_yticks([base])
    top.tick_params(axis="x", length=0, labelbottom=False)
    top.spines["bottom"].set_visible(False)
    for axes, end in ((top, 0.0), (bottom, 1.0)):
        axes.plot(
            [0],
            [end],
            transform=axes.transAxes,
            marker=[(-1, -0.5), (1, 0.5)],
            markersize=9,
            color=MUTED,
            clip_on=False,
        )
    return [top, bottom]


def memory_per_stage(run: RunRecord) -> Plot | None:
    """Peak memory of every stage, predicted and measured, as pairs of bars."""
    stages = [s for s in run.stages if s.measured_peak_bytes is not None or s.predicted_peak_bytes is not None]
    if not stages:
        return None
    highest = max(max(s.measured_peak_bytes or 0, s.predicted_peak_bytes or 0) for s in stages) or 1
    unit, name = (1024**3, "GiB") if highest >= 2 * 1024**3 else (MEBI, "MiB")
    with style():
        letters = max(len(stage.name) for stage in stages)
        left = min(0.45, 0.04 + 0.58 * FONT * letters / (72 * WIDTH))
        figure, axes = blank_figure(height=0.62 + 0.43 * len(stages), left=left)
        axes.set_ylim(len(stages) - 0.45, -0.55)
        axes.set_xlim(0, 1.2 * highest / unit)
        axes.set_yticks(range(len(stages)), [stage.name for stage in stages])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"peak memory, {name}")
        for row, stage in enumerate(stages):
            apart = 0.18 if stage.measured_peak_bytes is not None and stage.predicted_peak_bytes is not None else 0
            _bar(axes, row - apart, stage.measured_peak_bytes, unit, solid=True)
            _bar(axes, row + apart, stage.predicted_peak_bytes, unit, solid=False)
        words = "; ".join(
            f"{stage.name} {format_bytes(stage.measured_peak_bytes)} measured, "
            f"{format_bytes(stage.predicted_peak_bytes)} predicted"
            for stage in stages
        )
        return finished_plot(
            figure,
            name="memory",
            title="Memory per stage",
            description=f"Peak memory, measured and predicted. {words}.",
        )


def _bar(axes: Axes, place: float, size: int | None, unit: int, *, solid: bool) -> None:
    if size is None:
        return
    axes.barh(
        place,
        size / unit,
        height=0.3,
        color=ACCENT if solid else "none",
        edgecolor=ACCENT if solid else MUTED,
        linewidth=0.9,
        linestyle="-" if solid else (0, (3, 2)),
    )
    axes.annotate(
        format_column([size], scale=unit)[0],
        (size / unit, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center_baseline",
        color=INK if solid else MUTED,
        fontsize=FONT - 1.5,
    )
