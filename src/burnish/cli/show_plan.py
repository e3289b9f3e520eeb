"""What `plan` and `doctor` print. Torch-free."""

from __future__ import annotations

import textwrap

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from burnish.cli.output import has_width, print_table
from burnish.measure.formatting import format_bytes, format_count, format_seconds
from burnish.plan.doctor import Check
from burnish.plan.predict import Plan, StagePrediction
from burnish.plan.sharding import advised

_STATUS_STYLE = {"ok": "green", "missing": "dim", "warning": "yellow", "error": "red"}
_HARD = "\u00a0"  # where no line ends


def show_plan(console: Console, plan: Plan) -> None:
    """Sizes, then a line per stage with its largest parts."""
    device = plan.device
    console.print(f"{plan.model} on {device.name} ({format_bytes(device.usable_bytes)} usable)", style="bold")
    sizes = ", ".join(f"{name} {format_bytes(size)}".replace(" ", _HARD) for name, size in plan.weight_bytes.items())
    about = f"{format_count(plan.parameters)} parameters; weights in {sizes}"
    about = textwrap.fill(about, console.width) if has_width(console) else about
    console.print(about.replace(_HARD, " "), soft_wrap=True)
    per_token = format_bytes(plan.kv_bytes_per_token)
    console.print(f"loaded in {plan.dtype}; keys and values {per_token} per token")
    rows = [_stage_cells(stage) for stage in plan.stages]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    headings = ("stage", "peak", "fits", "time")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in ("peak", "time") else "left", no_wrap=True)
    table.add_column("largest parts", overflow="fold")
    columns = [[heading, *(str(row[place]) for row in rows)] for place, heading in enumerate(headings)]
    taken = sum(max(map(cell_len, column)) + 2 for column in columns)
    room = console.width - taken if has_width(console) else None
    for stage, cells in zip(plan.stages, rows):
        table.add_row(*cells, _largest(stage, room))
    print_table(console, table)
    for stage in plan.stages:
        if stage.remedy:
            console.print(f"{stage.name}: {stage.remedy}", style="dim", soft_wrap=True)
    if plan.splits:
        _show_splits(console, plan)


def _stage_cells(stage: StagePrediction) -> list[str | Text]:
    fits = Text("yes", style="green") if stage.fits else Text("no", style="red")
    time = "–" if stage.seconds is None else format_seconds(stage.seconds)
    return [stage.name, format_bytes(stage.peak_bytes), fits, time]


def _largest(stage: StagePrediction, room: int | None) -> str:
    """The three largest parts, or as many of them as `room` columns hold; the first in any case."""
    largest = sorted(stage.components.items(), key=lambda item: -item[1])[:3]
    parts = [f"{name} {format_bytes(size)}" for name, size in largest]
    while room is not None and len(parts) > 1 and cell_len(", ".join(parts)) > room:
        parts.pop()
    return ", ".join(parts)


def _show_splits(console: Console, plan: Plan) -> None:
    """A line per way of dividing the model over several devices."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("tensor", "stages", "peak of\neach", "fits", "weights", "KV", "activations", "sent per\ntoken"):
        table.add_column(heading, justify="left" if heading == "fits" else "right", no_wrap=True)
    for split in plan.splits:
        ways = [str(split.tensor_parallel), str(split.pipeline_parallel)]
        fits = Text("yes", style="green") if split.fits else Text("no", style="red")
        if split.reason is not None:
            table.add_row(*ways, "–", fits)
            continue
        parts = [format_bytes(split.components.get(part, 0)) for part in ("weights", "kv", "activations")]
        table.add_row(*ways, format_bytes(split.peak_bytes), fits, *parts, format_bytes(split.sent_bytes_per_token))
    print_table(console, table)
    for split in plan.splits:
        if split.reason is not None:
            console.print(f"{split.tensor_parallel} x {split.pipeline_parallel}: {split.reason}", style="dim")
    chosen = advised(plan.splits)
    if chosen is None:
        console.print("no way of dividing it fits: take more or larger devices", style="dim")
    else:
        flags = f"--tensor-parallel {chosen.tensor_parallel} --pipeline-parallel {chosen.pipeline_parallel}"
        console.print(f"generate with {flags}", style="dim")


def show_checks(console: Console, checks: list[Check]) -> None:
    """A line per fact, grouped."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for _ in range(4):
        table.add_column(overflow="fold")
    group = None
    for check in checks:
        detail = check.detail if check.remedy is None else f"{check.detail}. {check.remedy}".removeprefix(". ")
        mark = Text(check.status, style=_STATUS_STYLE.get(check.status, ""))
        table.add_row(check.group if check.group != group else "", check.name, mark, detail)
        group = check.group
    print_table(console, table)
