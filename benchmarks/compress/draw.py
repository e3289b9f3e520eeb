"""The study's plots: quality against bytes, tokens/s and memory, and distances of all programs by width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from burnish.measure.plot_labels import place_labels

MIB = 1024**2
COLOURS = ("#1f5fa8", "#c8551b", "#2f8f5b", "#8a4fa3", "#b58900", "#3b3b3b", "#d1477a", "#5a8f9c", "#7a5c3e", "#888888")
MARKERS = "osD^vPX*<>"
FONT = 8.0


def draw(record: dict[str, Any], path: Path) -> list[Path]:
    """Write the figure as SVG and PNG beside the record; nothing where there is nothing to show."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scored = [entry for entry in record["variants"] if entry["work"] == "sql" and "quality" in entry]
    rows = [row for peer in record["peers"] for row in peer.get("rows", []) if "perplexity" in row]
    if not scored and not rows:
        return []
    with matplotlib.rc_context({"font.size": FONT, "svg.hashsalt": "burnish", "axes.spines.top": False}):
        figure, axes = pyplot.subplots(2, 2, figsize=(13, 10))
        for axis in axes.flat:
            axis.spines["right"].set_visible(False)
            axis.grid(visible=True, color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
        _scatter(axes[0][0], scored, "disk", "weight files, MiB")
        _scatter(axes[0][1], scored, "speed", "output tokens/s, 8 requests at once")
        _scatter(axes[1][0], scored, "memory", "memory while answering, MiB over the start")
        _widths(axes[1][1], rows)
        families = {entry["family"]: _style(entry["family"], scored) for entry in scored}
        handles = [
            pyplot.Line2D([], [], linestyle="", marker=marker, color=colour, label=family)
            for family, (colour, marker) in families.items()
        ]
        if handles:
            figure.legend(handles=handles, loc="upper center", ncol=len(handles), frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.965))
        made = [path.with_name(path.name + ending) for ending in (".svg", ".png")]
        for file in made:
            figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)
        pyplot.close(figure)
    return made


def _style(family: str, entries: list[dict[str, Any]]) -> tuple[str, str]:
    names = list(dict.fromkeys(entry["family"] for entry in entries))
    place = names.index(family) % len(COLOURS)
    return COLOURS[place], MARKERS[place]


def _value(entry: dict[str, Any], what: str) -> float | None:
    if what == "disk":
        return entry["disk_bytes"] / MIB
    if what == "speed":
        return entry.get("speed", {}).get("output_tokens_per_s_8")
    memory = entry.get("inference_memory_bytes")
    return None if memory is None else memory / MIB


def _scatter(axis: Any, entries: list[dict[str, Any]], what: str, label: str) -> None:
    points = [(value, entry) for entry in entries if (value := _value(entry, what)) is not None]
    axis.set_xlabel(label)
    axis.set_ylabel("execution accuracy, % (95 % interval)")
    if not points:
        axis.set_visible(False)
        return
    for value, entry in points:
        task = entry["quality"]["task"]
        colour, marker = _style(entry["family"], entries)
        low, score, high = (100 * task[name] for name in ("score_low", "score", "score_high"))
        axis.errorbar(
            value, score, yerr=[[score - low], [high - score]], color=colour, marker=marker, elinewidth=0.6, ms=5
        )
    axis.margins(x=0.12, y=0.08)
    if what == "disk":
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.figure.canvas.draw()
    blocks = []
    for value, entry in points:
        x, y = axis.transData.transform((value, 100 * entry["quality"]["task"]["score"]))
        blocks.append((x - 4, y - 4, x + 4, y + 4))
    size = FONT * 0.85 * axis.figure.dpi / 72
    frame = axis.get_window_extent()
    bounds = (frame.x0, frame.y0, frame.x1, frame.y1)
    names = [entry["name"] for _, entry in points]
    for name, place in zip(names, place_labels(names, blocks, bounds=bounds, font_size=size)):
        x, y = axis.transData.inverted().transform(place)
        axis.text(x, y, name, fontsize=FONT * 0.85, color="#333333")


def _widths(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Each program's best scheme at each width."""
    axis.set_xlabel("bits per weight, one scale per output channel")
    axis.set_ylabel("stories260k: mean KL from float32, nats per token (log)")
    if not rows:
        axis.set_visible(False)
        return
    tools = list(dict.fromkeys(row["tool"] for row in rows))
    for place, tool in enumerate(tools):
        best: dict[int, float] = {}
        for row in rows:
            if row["tool"] == tool:
                best[row["bits"]] = min(row["kl_mean"], best.get(row["bits"], float("inf")))
        bits = sorted(best)
        axis.plot(
            bits,
            [best[width] for width in bits],
            marker=MARKERS[place],
            color=COLOURS[place],
            label=f"{tool}, its best",
        )
    axis.set_yscale("log")
    axis.set_xticks([2, 3, 4, 8])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.legend(frameon=False)
