"""What `tune` and its dry run print.

Memory is said as everywhere in burnish's records: over the start, that is what loading and training add to a process
that has its libraries.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from burnish.cli.output import print_table
from burnish.cli.show_stages import facts
from burnish.measure.formatting import format_bytes, format_count, format_ratio, format_seconds, format_share, ratio
from burnish.pipeline.tune import TuneRecord
from burnish.pipeline.tune_rehearsal import RehearsalRecord
from burnish.train.results import STEADY_AFTER


def show_tune(console: Console, record: TuneRecord) -> None:
    """What a tuning run did."""
    losses = [step["loss"] for step in record.steps]
    tail = losses[-20:]
    rows = [
        (
            "method",
            f"{record.method}, {record.precision}, {format_count(record.trained_parameters)} trained parameters",
        ),
        ("rows", f"{record.num_examples} used, {record.num_bad_rows} bad, {record.num_too_long} too long"),
        ("steps", f"{len(record.steps)} in {format_seconds(record.seconds)} ({record.stopped})"),
        ("speed", _speed(record)),
        ("loss", f"{losses[0]:.3f} -> {sum(tail) / len(tail):.3f}" if losses else "-"),
        ("memory, peak", _memory(record)),
        *_parts(record),
    ]
    if record.phase_seconds:
        rows.insert(4, ("time", _split(record.phase_seconds)))
    if record.trace is not None:
        rows.append(("trace", f"{record.trace} (open it in chrome://tracing or ui.perfetto.dev)"))
    if record.evals and record.evals[-1].get("loss") is not None:
        rows.insert(5, ("evaluation loss", f"{record.evals[-1]['loss']:.3f}"))
    facts(console, record.adapter, rows)


def show_rehearsal(console: Console, record: RehearsalRecord) -> None:
    """What a tuning run would do, from a dry run."""
    rows = [
        ("method", f"{record.method}, computed in {record.precision}, base in {record.dtype}"),
        ("rows", f"{record.num_examples}, the longest of {record.longest} tokens, {record.num_too_long} too long"),
        ("a step", record.setting),
        ("steps", f"{record.steps:,} over {record.tokens:,} tokens"),
        ("time", f"{format_seconds(record.seconds)} at {record.tokens_per_s:,.0f} tokens/s, without evaluations"),
        ("memory, trial", f"{format_bytes(record.measured_peak_bytes)} over the start"),
        ("memory, predicted", f"{format_bytes(record.predicted_peak_bytes)} over the start"),
        *[(f"  {name}", format_bytes(size)) for name, size in record.predicted_components.items()],
        ("the whole process", _whole(record)),
    ]
    if record.fit is not None:
        budget = format_bytes(record.fit["budget_bytes"])
        rows.insert(3, ("chosen", f"for {budget}: {record.fit['reason']}"))
    facts(console, f"{record.base} (dry run)", rows)


def _speed(record: TuneRecord) -> str:
    """Tokens per second, and which steps they are of."""
    left_out = f", without the first {STEADY_AFTER} steps" if len(record.steps) > STEADY_AFTER else ""
    return f"{record.tokens_per_s:,.0f} tokens/s{left_out}"


def _memory(record: TuneRecord) -> str:
    text = f"{format_bytes(record.peak_memory_bytes)} over the start"
    if record.predicted_peak_bytes is None:
        return text
    share = format_ratio(ratio(record.peak_memory_bytes, record.predicted_peak_bytes))
    return f"{text} (predicted {format_bytes(record.predicted_peak_bytes)}, measured/predicted {share})"


def _whole(record: RehearsalRecord) -> str:
    total = record.start_bytes + record.predicted_peak_bytes
    start = f"{format_bytes(record.start_bytes)} at the start" if record.start_bytes else "nothing at the start"
    return f"{format_bytes(total)} predicted, {start} included: what --memory limits"


def _parts(record: TuneRecord) -> list[tuple[str, str]]:
    """Memory by component, predicted beside measured."""
    lines = []
    for name, size in record.component_bytes.items():
        predicted = record.predicted_components.get(name)
        beside = "" if predicted is None else f" (predicted {format_bytes(predicted)})"
        lines.append((f"  {name}", f"{format_bytes(size)}{beside}"))
    return lines


def _split(phases: Mapping[str, float]) -> str:
    total = sum(phases.values()) or 1.0
    return ", ".join(f"{name} {format_share(seconds / total)}" for name, seconds in phases.items())


def show_operators(console: Console, record: TuneRecord, *, most: int = 10) -> None:
    """The operators of a trace that took longest in themselves."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("operator", overflow="fold")
    for heading in ("calls", "time", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for operator in record.operators[:most]:
        time, share = format_seconds(operator["seconds"]), format_share(operator["share"])
        table.add_row(operator["name"], str(operator["calls"]), time, share)
    console.print(f"dearest operators of the steps in {record.trace}", style="bold")
    print_table(console, table)
