"""The report's plots as inline SVG. Torch-free; matplotlib is imported when the first plot is drawn, without a display.

Colours are sentinels that become CSS variables, so that one drawing serves light and dark pages; text stays text and
takes the page's font. The same record gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from burnish.measure.formatting import format_bytes, format_column, format_rate, format_share, is_missing
from burnish.measure.plot_labels import place_labels
from burnish.measure.run_record import LossPoint, RunRecord, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _GRID, _ACCENT, _SECOND, _FAIL, _SURFACE = (f"#01020{digit}" for digit in range(3, 10))
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    _ACCENT: "var(--accent)",
    _SECOND: "var(--second)",
    _FAIL: "var(--fail)",
    _SURFACE: "var(--surface)",
}
_WIDTH = 5.2  # inches; at 72 units each a phone shows the letters at their size
_FONT = 9.5
_HEIGHT = 3.2
_MEBI = 1024**2
_BREAK = 0.35  # an empty stretch of the score axis from which on it is broken


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing with what it shows in words, for those who cannot see it."""

    name: str
    title: str
    description: str
    svg: str


def draw_plots(run: RunRecord) -> list[Plot]:
    """Every plot that the record has figures for."""
    makers: tuple[Callable[[RunRecord], Plot | None], ...] = (
        quality_against_size,
        quality_against_speed,
        memory_per_stage,
        loss_curve,
    )
    return [plot for plot in (make(run) for make in makers) if plot is not None]


def quality_against_size(run: RunRecord) -> Plot | None:
    """Score with its interval over disk size; None without two known points."""
    known = [(v, v.disk_bytes / _MEBI, v.score) for v in run.variants if v.disk_bytes and v.score is not None]
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
    with _style():
        figure, whole = _figure(height=_HEIGHT)
        parts = _score_axes(figure, whole, [variant for variant, _, _ in known])
        lowest, highest = min(x for _, x, _ in known), max(x for _, x, _ in known)
        room = max(0.18 * (highest - lowest), 0.06 * highest) or 1.0
        for axes in parts:
            axes.set_xlim(max(0.0, lowest - room), highest + room)
        parts[-1].set_xlabel(axis)
        figure.text(
            0.022, sum(whole.get_position().intervaly) / 2, f"{run.metric}, %", rotation=90, va="center", color=_MUTED
        )
        blocks = []
        for variant, x, score in known:
            low, high = _interval(variant)
            axes = next((part for part in parts if part.get_ylim()[0] <= 100 * score), parts[-1])
            color = _FAIL if variant.verdict == "fail" else _MUTED if variant.parent is None else _ACCENT
            axes.vlines(x, 100 * low, 100 * high, color=color, linewidth=2.4, alpha=0.4)
            marker = "X" if variant.verdict == "fail" else "o"
            axes.plot(
                [x], [100 * score], marker, color=color, markersize=7, markeredgecolor=_SURFACE, zorder=3, clip_on=False
            )
            left, bottom = axes.transData.transform((x, 100 * low))
            _, top = axes.transData.transform((x, 100 * high))
            middle = axes.transData.transform((x, 100 * score))[1]
            blocks.append((left - 4, min(bottom, middle - 4), left + 4, max(top, middle + 4)))
        frame = figure.transFigure.transform([(whole.get_position().x0, 0), (1, 1)])
        bounds = (frame[0][0] + 2, parts[-1].bbox.y0, frame[1][0] - 2, parts[0].bbox.y1 + _FONT)
        names = [variant.name for variant, _, _ in known]
        for text, (x, y) in zip(names, place_labels(names, blocks, bounds=bounds, font_size=_FONT)):
            place = figure.transFigure.inverted().transform((x, y))
            figure.text(
                float(place[0]), float(place[1]), text, ha="left", va="baseline", color=_INK, fontsize=_FONT, zorder=4
            )
        return _plot(figure, name=name, title=title, description=f"{title}. {words}.")


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
            color=_MUTED,
            clip_on=False,
        )
    return [top, bottom]


def memory_per_stage(run: RunRecord) -> Plot | None:
    """Peak memory of every stage, predicted and measured, as pairs of bars."""
    stages = [s for s in run.stages if s.measured_peak_bytes is not None or s.predicted_peak_bytes is not None]
    if not stages:
        return None
    highest = max(max(s.measured_peak_bytes or 0, s.predicted_peak_bytes or 0) for s in stages) or 1
    unit, name = (1024**3, "GiB") if highest >= 2 * 1024**3 else (_MEBI, "MiB")
    with _style():
        letters = max(len(stage.name) for stage in stages)
        left = min(0.45, 0.04 + 0.58 * _FONT * letters / (72 * _WIDTH))
        figure, axes = _figure(height=0.62 + 0.43 * len(stages), left=left)
        axes.set_ylim(len(stages) - 0.45, -0.55)
        axes.set_xlim(0, 1.2 * highest / unit)
        axes.set_yticks(range(len(stages)), [stage.name for stage in stages])
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
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
        return _plot(
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
        color=_ACCENT if solid else "none",
        edgecolor=_ACCENT if solid else _MUTED,
        linewidth=0.9,
        linestyle="-" if solid else (0, (3, 2)),
    )
    axes.annotate(
        format_column([size], scale=unit)[0],
        (size / unit, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center_baseline",
        color=_INK if solid else _MUTED,
        fontsize=_FONT - 1.5,
    )


def loss_curve(run: RunRecord) -> Plot | None:
    """Training loss by step, smoothed over it, and the held-out loss."""
    train, held_out = _finite(run.loss), _finite(run.eval_loss)
    if len(train) < 2:
        return None
    with _style():
        figure, axes = _figure(height=_HEIGHT)
        steps = [point.step for point in train]
        losses = [point.loss for point in train]
        smooth = _smoothed(losses)
        axes.plot(steps, losses, color=_ACCENT, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smooth, color=_ACCENT, linewidth=1.8)
        if held_out:
            axes.plot(
                [point.step for point in held_out],
                [point.loss for point in held_out],
                color=_SECOND,
                linewidth=1.4,
                marker="o",
                markersize=4,
                markeredgecolor=_SURFACE,
                markeredgewidth=0.8,
            )
        axes.set_xlim(min(steps), max(steps) + 0.02 * (max(steps) - min(steps)))
        top = max([*smooth, *(point.loss for point in held_out)])
        axes.set_ylim(0, 1.08 * top if top > 0 else 1.0)
        axes.set_xlabel("optimizer step")
        figure.text(
            0.022,
            sum(axes.get_position().intervaly) / 2,
            "loss, nats per token",
            rotation=90,
            va="center",
            color=_MUTED,
        )
        words = f"From {losses[0]:.3f} at step {steps[0]} to {smooth[-1]:.3f} at step {steps[-1]}"
        words += f"; held out {held_out[-1].loss:.3f} at step {held_out[-1].step}." if held_out else "."
        return _plot(figure, name="loss", title="Training loss", description=f"Training loss. {words}")


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


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "burnish",
            "font.family": "DejaVu Sans",
            "font.size": _FONT,
            "figure.dpi": 72,  # one pixel is one unit of the drawing
            "text.color": _INK,
            "text.parse_math": False,  # a $ in a name is a $
            "axes.facecolor": "none",
            "axes.edgecolor": _GRID,
            "axes.labelcolor": _MUTED,
            "axes.labelsize": _FONT,
            "axes.linewidth": 0.8,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.unicode_minus": True,
            "grid.color": _GRID,
            "grid.linewidth": 0.7,
            "xtick.color": _GRID,
            "ytick.color": _GRID,
            "xtick.labelcolor": _MUTED,
            "ytick.labelcolor": _MUTED,
            "xtick.labelsize": _FONT - 0.5,
            "ytick.labelsize": _FONT - 0.5,
            "ytick.major.size": 0,
        }
    )


def _figure(*, height: float, left: float = 0.115) -> tuple[Figure, Axes]:
    """A bare figure with one axes; heights in inches, margins fixed so that all plots line up."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=72)
    FigureCanvasSVG(figure)
    axes = figure.add_axes((left, 0.5 / height, 0.985 - left, 1 - 0.62 / height))
    return figure, axes


def _name_height(figure: Figure, axes: Axes, text: str) -> None:
    """Name the y axis at one distance from the edge, however wide its numbers are."""
    middle = sum(axes.get_position().intervaly) / 2
    figure.text(0.022, middle, text, rotation=90, ha="center", va="center", color=_MUTED, fontsize=_FONT)


def _plot(figure: Figure, *, name: str, title: str, description: str) -> Plot:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Plot(name=name, title=title, description=description, svg=_inline(buffer.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """An SVG document as an element for a page: no prolog, metadata or namespaces, and ids that no other plot has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)  # a style would be the page's
    svg = re.sub(r'\sxmlns(?::\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"font-family: [^;\"]+;?", "", svg)
    svg = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]+", r"\1 var(--sans)", svg)
    for sentinel, variable in _VARIABLES.items():
        svg = svg.replace(sentinel, variable)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 aria-labelledby="{name}-title" role="img">', svg)
    return svg.strip()
