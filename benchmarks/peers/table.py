"""From the results of many runs to a table: medians, extremes, and ratios paired by round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Result = dict[str, Any]
"""What an adapter printed, with `round` and `name` beside."""


@dataclass(frozen=True)
class Figure:
    """A column: its heading, the key of a result, and whether less is better."""

    heading: str
    key: str
    digits: int
    less_is_better: bool = False


FIGURES = {
    "w1": (Figure("total tokens/s", "total_tokens_per_s", 1),),
    "w2": (
        Figure("TTFT ms", "ttft_ms", 0, less_is_better=True),
        Figure("decode tokens/s", "decode_tokens_per_s", 2),
    ),
}


def work_table(work: str, results: Sequence[Result], relative: str) -> str:
    """The Markdown table of one work; `relative` names the system that the ratios are to, above 1 being better."""
    found = [result for result in results if result["work"]["name"] == work]
    figures = FIGURES[work]
    headings = ["system"]
    for figure in figures:
        headings += [figure.heading, f"x {relative}"]
    rows = [[*headings, "first tokens equal", "peak RSS MiB", "load s"]]
    for name in dict.fromkeys(result["name"] for result in found):
        mine = [result for result in found if result["name"] == name]
        theirs = [result for result in found if result["name"] == relative]
        row = [name]
        for figure in figures:
            values = [value for result in mine for value in result[figure.key]]
            row += [spread(values, figure.digits), spread(paired_ratios(figure, mine, theirs), 2)]
        loads = [result["load_s"] for result in mine if result["load_s"] is not None]
        peak = max(result["peak_rss_mib"] for result in mine)
        rows.append([*row, _agreement(mine, theirs), f"{peak:.0f}", spread(loads, 1, extremes=False)])
    return aligned(rows)


def paired_ratios(figure: Figure, mine: Iterable[Result], theirs: Iterable[Result]) -> list[float]:
    """One ratio a round that has both systems, of the round's medians; above 1 where `mine` is better."""
    base = {result["round"]: median(result[figure.key]) for result in theirs}
    pairs = [(median(result[figure.key]), base[result["round"]]) for result in mine if result["round"] in base]
    return [other / value if figure.less_is_better else value / other for value, other in pairs]


def _agreement(mine: Sequence[Result], theirs: Sequence[Result]) -> str:
    """How many requests of the warm-up pass began with the same token in both systems."""
    if not theirs or not mine[0]["first_tokens"] or not theirs[0]["first_tokens"]:
        return "-"
    pairs = list(zip(mine[0]["first_tokens"], theirs[0]["first_tokens"]))
    return f"{sum(a == b for a, b in pairs)}/{len(pairs)}"


def spread(values: Sequence[float], digits: int, *, extremes: bool = True) -> str:
    """Median, and least to most where there are several; "-" for none."""
    if not values:
        return "-"
    middle = f"{median(values):.{digits}f}"
    if len(values) == 1 or not extremes:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def aligned(rows: list[list[str]]) -> str:
    """Aligned Markdown; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
