"""The report in text: a table for the terminal, Markdown, CSV. Torch-free."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from burnish.measure.formatting import (
    MISSING,
    format_bytes,
    format_column,
    format_divergence,
    format_interval,
    format_ratio,
    format_seconds,
    format_share,
    ratio,
)
from burnish.measure.report import build_report, headline
from burnish.measure.run_record import RunRecord, Stage, Variant

MEBI = 1024**2
_WIDE = 108


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the variants table."""

    heading: str
    cells: list[str]
    left: bool = False


def variant_columns(run: RunRecord) -> list[Column]:
    """The variants as aligned text columns; units stand in the headings so that cells stay narrow."""
    variants = run.variants

    def column(heading: str, values: list[str], *, left: bool = False) -> Column:
        return Column(heading=heading, cells=values, left=left)

    return [
        column("variant", [variant.name for variant in variants], left=True),
        column("disk\nMiB", format_column([variant.disk_bytes for variant in variants], scale=MEBI)),
        column("peak\nMiB", format_column([variant.peak_memory_bytes for variant in variants], scale=MEBI)),
        column("TTFT\nms", format_column([variant.ttft_ms for variant in variants])),
        column("tok/s\nat 1", format_column([variant.output_tokens_per_s_1 for variant in variants])),
        column("tok/s\nat 8", format_column([variant.output_tokens_per_s_8 for variant in variants])),
        column("score\n%", [_percent(variant.score) for variant in variants]),
        column("95 %\ninterval", [_interval(variant) for variant in variants]),
        column("KL to\nparent", [format_divergence(variant.kl_to_parent) for variant in variants]),
        column("agree\n%", [_percent(variant.greedy_agreement) for variant in variants]),
        column("verdict", [variant.verdict or MISSING for variant in variants], left=True),
    ]


def stage_columns(run: RunRecord) -> list[Column]:
    """The stages as text columns: time, and memory predicted beside measured."""
    stages = run.stages
    return [
        Column(heading="stage", cells=[stage.name for stage in stages], left=True),
        Column(heading="time", cells=[stage_time(stage) for stage in stages]),
        Column(heading="predicted\npeak", cells=[format_bytes(stage.predicted_peak_bytes) for stage in stages]),
        Column(heading="measured\npeak", cells=[format_bytes(stage.measured_peak_bytes) for stage in stages]),
        Column(heading="measured /\npredicted", cells=[format_ratio(peak_ratio(stage)) for stage in stages]),
    ]


def stage_time(stage: Stage) -> str:
    """How long a stage took, or that it failed or was left out."""
    return format_seconds(stage.seconds) if stage.status == "done" else stage.status


def peak_ratio(stage: Stage) -> float | None:
    """Measured over predicted peak memory."""
    return ratio(stage.measured_peak_bytes, stage.predicted_peak_bytes)


def render_table(run: RunRecord, *, width: int = 100, color: bool = False) -> str:
    """Headline, variants and stages for a terminal `width` columns wide (80 is enough)."""
    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=max(width, 40),
        force_terminal=color,
        color_system="standard" if color else None,
        highlight=False,
        emoji=False,
    )
    padding = (0, 1) if width >= _WIDE else (0, 0)
    summary = headline(run)
    style = {"pass": "green", "fail": "red"}.get(summary.verdict, "")
    title = Text(summary.title, style=f"bold {style}".strip())
    lines = [Text(" ".join(summary.sentences))] if summary.sentences else []
    about = Text(" · ".join(_about(run)), style="dim")
    parts: list[Text | Table] = [about, title, *lines]
    if run.variants:
        parts += [Text(), _table(variant_columns(run), padding)]
        parts += [
            Text(f"{variant.name}: {'; '.join(variant.reasons)}", style="red" if variant.verdict == "fail" else "")
            for variant in run.variants
            if variant.reasons
        ]
    if run.stages:
        parts += [Text(), _table(stage_columns(run), (0, 1))]
    console.print(Group(*parts))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _about(run: RunRecord) -> list[str]:
    cores = run.hardware.get("cores")
    return [
        text
        for text in (
            run.name,
            run.model,
            run.task,
            str(run.hardware.get("cpu") or ""),
            f"{cores} cores" if cores else "",
        )
        if text
    ]


def _table(columns: list[Column], padding: tuple[int, int]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=padding, pad_edge=False, header_style="bold", show_edge=False)
    for number, column in enumerate(columns):
        table.add_column(
            escape(column.heading),
            justify="left" if column.left else "right",
            no_wrap=number > 0,
            overflow="fold" if number == 0 else "ellipsis",
            min_width=6 if number == 0 else None,
            vertical="bottom",
        )
    for row in zip(*(column.cells for column in columns)):
        table.add_row(*(Text(cell, style=_verdict_style(cell)) for cell in row))
    return table


def _verdict_style(cell: str) -> str:
    return {"pass": "green", "fail": "bold red", "failed": "bold red"}.get(cell, "")


def render_markdown(run: RunRecord) -> str:
    """The same tables in Markdown, for a pull request or a page."""
    summary = headline(run)
    lines = [
        f"# {_markdown(run.name)}",
        "",
        f"**{_markdown(summary.title)}.** {_markdown(' '.join(summary.sentences))}",
    ]
    about = " · ".join(_about(run)[1:])
    if about:
        lines += ["", _markdown(about)]
    if run.variants:
        lines += ["", *_markdown_table(variant_columns(run))]
        lines += [
            f"\n{_markdown(variant.name)}: {_markdown('; '.join(variant.reasons))}"
            for variant in run.variants
            if variant.reasons
        ]
    if run.stages:
        lines += ["", *_markdown_table(stage_columns(run))]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _markdown_table(columns: list[Column]) -> list[str]:
    headings = [column.heading.replace("\n", " ") for column in columns]
    rows = [
        headings,
        ["---" if column.left else "---:" for column in columns],
        *([_markdown(cell) for cell in row] for row in zip(*(column.cells for column in columns))),
    ]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _markdown(text: str) -> str:
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def render_csv(run: RunRecord) -> str:
    """The variants with plain numbers and the names of the JSON report; an empty cell where nothing was measured."""
    rows = build_report(run)["variants"]
    buffer = io.StringIO()
    names = list(rows[0]) if rows else ["name"]
    writer = csv.DictWriter(buffer, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else value for name, value in row.items()})
    return buffer.getvalue()


def _percent(value: float | None) -> str:
    return format_share(value).removesuffix(" %")


def _interval(variant: Variant) -> str:
    return format_interval(variant.score_low, variant.score_high)
