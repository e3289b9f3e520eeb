"""How the report's plots are drawn: sizes, colours, and a figure as an element of a page. Torch-free.

Colours are sentinels that become CSS variables, so that one drawing serves light and dark pages; text stays text and
takes the page's font. The same figures give the same bytes. matplotlib is imported when the first plot is drawn,
without a display.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, ACCENT, SECOND, FAIL, SURFACE = (f"#01020{digit}" for digit in range(3, 10))
LAYERS = tuple(f"#01030{digit}" for digit in range(1, 8))
"""Colours of parts that stand on each other."""

_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    ACCENT: "var(--accent)",
    SECOND: "var(--second)",
    FAIL: "var(--fail)",
    SURFACE: "var(--surface)",
    **{layer: f"var(--layer-{number})" for number, layer in enumerate(LAYERS, 1)},
}
WIDTH = 5.2  # inches; at 72 units each a phone shows the letters at their size
FONT = 9.5
HEIGHT = 3.2
MEBI = 1024**2


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A drawing with what it shows in words, for those who cannot see it."""

    name: str
    title: str
    description: str
    svg: str
    key: tuple[tuple[str, str], ...] = ()
    """(CSS class of the sign, words) of a legend."""


def style() -> Any:
    """matplotlib's settings for the time of a block."""
    from matplotlib import rc_context

    return rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "burnish",
            "font.family": "DejaVu Sans",
            "font.size": FONT,
            "figure.dpi": 72,  # one pixel is one unit of the drawing
            "text.color": INK,
            "text.parse_math": False,  # a $ in a name is a $
            "axes.facecolor": "none",
            "axes.edgecolor": GRID,
            "axes.labelcolor": MUTED,
            "axes.labelsize": FONT,
            "axes.linewidth": 0.8,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.unicode_minus": True,
            "grid.color": GRID,
            "grid.linewidth": 0.7,
            "xtick.color": GRID,
            "ytick.color": GRID,
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": MUTED,
            "xtick.labelsize": FONT - 0.5,
            "ytick.labelsize": FONT - 0.5,
            "ytick.major.size": 0,
        }
    )


def blank_figure(*, height: float, left: float = 0.115) -> tuple[Figure, Axes]:
    """A bare figure with one axes; heights in inches, margins fixed so that all plots line up."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=72)
    FigureCanvasSVG(figure)
    axes = figure.add_axes((left, 0.5 / height, 0.985 - left, 1 - 0.62 / height))
    return figure, axes


def name_height(figure: Figure, axes: Axes, text: str) -> None:
    """Name the y axis at one distance from the edge, however wide its numbers are."""
    middle = sum(axes.get_position().intervaly) / 2
    figure.text(0.022, middle, text, rotation=90, ha="center", va="center", color=MUTED, fontsize=FONT)


def finished_plot(
    figure: Figure, *, name: str, title: str, description: str, key: tuple[tuple[str, str], ...] = ()
) -> Plot:
    """The figure as an element; `key` as in `Plot`."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Plot(name=name, title=title, description=description, svg=_inline(buffer.getvalue(), name), key=key)


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
