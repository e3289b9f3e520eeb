"""Records of stages as short tables for people."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from burnish.cli.output import print_table
from burnish.measure.formatting import (
    format_bytes,
    format_count,
    format_divergence,
    format_interval,
    format_ratio,
    format_seconds,
    format_share,
    ratio,
)
from burnish.pipeline.export import ExportRecord
from burnish.pipeline.gates import GateResult
from burnish.pipeline.merge import MergeRecord
from burnish.pipeline.prune import PruneRecord
from burnish.pipeline.quantize import QuantizeRecord


def facts(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """A title and aligned name-value lines."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(title, style="bold")
    print_table(console, table)


def _memory(peak: int, predicted: int | None) -> str:
    text = format_bytes(peak)
    if predicted is not None:
        text += f" (predicted {format_bytes(predicted)}, measured/predicted {format_ratio(ratio(peak, predicted))})"
    return text


def _gate(gate: GateResult) -> list[tuple[str, str]]:
    return [
        ("gate", gate.verdict),
        (
            "KL to parent",
            f"{format_divergence(gate.kl_mean)} nats/token{_limit(gate.limits.max_kl_mean)}, "
            f"99th percentile {format_divergence(gate.kl_p99)}{_limit(gate.limits.max_kl_p99)}",
        ),
        (
            "greedy agreement",
            f"{format_share(gate.greedy_agreement, digits=2)} of {format_count(gate.num_tokens)} tokens"
            + ("" if (least := gate.limits.min_greedy_agreement) is None else f" (limit {format_share(least)})"),
        ),
        ("perplexity", f"{gate.perplexity_child:.4g} (parent {gate.perplexity_parent:.4g})"),
        *task_lines(gate),
        *[("reason", reason) for reason in gate.reasons],
    ]


def task_lines(gate: GateResult) -> list[tuple[str, str]]:
    """The task's score beside the parent's, with what was lost and gained."""
    task = gate.task
    if task is None:
        return []
    most = gate.limits.max_score_drop
    drop = f"{format_interval(task.drop_low, task.drop_high)} points below {format_share(task.parent_score)}"
    return [
        (
            task.metric,
            f"{format_share(task.score)} of {task.num_rows} (95 % interval "
            f"{format_interval(task.score_low, task.score_high)}), {drop}"
            + ("" if most is None else f" (limit {format_share(most)})"),
        ),
        ("answers", f"{task.lost} lost, {task.gained} gained, {task.reworded} reworded (p = {task.p_value:.2g})"),
    ]


def _limit(value: float | None) -> str:
    return "" if value is None else f" (limit {value:g})"


def show_merge(console: Console, record: MergeRecord) -> None:
    """What a merge did."""
    rows = [
        ("merged", f"{record.merged_linears} linears of {record.adapter} into {record.base}"),
        ("onto", f"{record.onto} weights: {record.reason}"),
        ("written", f"{record.dtype}, {format_bytes(record.disk_bytes)} in {format_seconds(record.seconds)}"),
        ("memory, peak", _memory(record.peak_memory_bytes, record.predicted_peak_bytes)),
        *_gate(record.gate),
    ]
    facts(console, record.out, rows)


def _widths(record: QuantizeRecord) -> str:
    if not record.widths:
        return f"{record.bits} bits"
    counts = Counter(record.widths.values())
    return "mixed bits (" + ", ".join(f"{counts[bits]} linears of {bits}" for bits in sorted(counts)) + ")"


def show_quantize(console: Console, record: QuantizeRecord) -> None:
    """What a quantization did."""
    worst = sorted(record.layers, key=lambda layer: layer.error, reverse=True)[:3]
    rows = [
        (
            "method",
            f"{record.method}, {_widths(record)}, {_groups(record.group_size)}, "
            f"{record.bits_per_weight:.2f} stored bits per weight, {record.format} layout",
        ),
        (
            "calibration",
            f"{record.calibration_tokens} tokens of {record.calibration_source}"
            if record.calibration_source
            else "none",
        ),
        ("written", f"{format_bytes(record.disk_bytes)} in {format_seconds(record.seconds)}"),
        ("memory, peak", _memory(record.peak_memory_bytes, record.predicted_peak_bytes)),
        ("worst layers", ", ".join(f"{layer.name.removeprefix('model.')} {layer.error:.4f}" for layer in worst)),
        *_gate(record.gate),
    ]
    if (qat := record.qat) is not None:
        change = f"loss {qat.loss_before:.4f} -> {qat.loss_after:.4f}, {format_share(qat.changed)} of integers changed"
        rows.insert(2, ("trained", f"{qat.steps} steps in {format_seconds(qat.seconds)}, {change}"))
    facts(console, record.out, rows)


def _groups(size: int) -> str:
    return "one scale per output" if size == -1 else f"groups of {size}"


def show_prune(console: Console, record: PruneRecord) -> None:
    """What a pruning did, and what it is worth."""
    worst = sorted(record.layers, key=lambda layer: layer.error, reverse=True)[:3]
    rows = [
        ("method", f"{record.method}, {record.amount}"),
        ("sparsity", f"{format_share(record.sparsity)} of the weights in the blocks"),
        ("parameters", f"{format_count(record.parameters)} of {format_count(record.parent_parameters)}"),
        (
            "calibration",
            f"{record.calibration_tokens} tokens of {record.calibration_source}"
            if record.calibration_tokens
            else "none",
        ),
        ("written", f"{format_bytes(record.disk_bytes)} in {format_seconds(record.seconds)}"),
        ("memory, peak", _memory(record.peak_memory_bytes, None)),
        ("worst layers", ", ".join(f"{layer.name.removeprefix('model.')} {layer.error:.4f}" for layer in worst)),
        *_gate(record.gate),
        ("speed", record.speed),
    ]
    if record.dense_columns:
        rows.insert(2, ("left dense", f"{record.dense_columns} columns that fill no whole run of the pattern"))
    if (recovery := record.recovery) is not None:
        change = f"loss {recovery.loss_before:.3f} -> {recovery.loss_after:.3f}"
        rows.insert(3, ("recovery", f"{recovery.steps} steps in {format_seconds(recovery.seconds)}, {change}"))
    facts(console, record.out, rows)


def show_export(console: Console, record: ExportRecord) -> None:
    """What was written, what it lacks, and what the other program made of it."""
    rows = [
        ("format", f"{record.to}, {record.format}"),
        ("written", f"{format_bytes(record.disk_bytes)} in {format_seconds(record.seconds)}"),
        ("memory, peak", format_bytes(record.peak_memory_bytes)),
    ]
    if record.kept_f16:
        rows.append(("kept in float16", f"{len(record.kept_f16)} tensors whose rows are no multiple of 32"))
    rows += [("note", note) for note in record.notes]
    if record.gate is None:
        rows.append(("gate", f"not compared: {record.compared_by} is not installed"))
    else:
        rows += [("compared by", record.compared_by), *_gate(record.gate)]
    facts(console, record.out, rows)
