"""Scores and speeds as short tables for people."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from burnish.cli.output import print_table
from burnish.cli.show_stages import facts, task_lines
from burnish.measure.bench import BenchResult, VersusResult
from burnish.measure.formatting import (
    format_bytes,
    format_divergence,
    format_interval,
    format_milliseconds,
    format_rate,
    format_ratio,
    format_seconds,
    format_share,
)
from burnish.pipeline.evaluate import EvalRecord


def show_eval(console: Console, record: EvalRecord, *, num_wrong: int = 0) -> None:
    """A score, its kinds, and some wrong answers."""
    rows = [("task", f"{record.task} on {record.data}" + (f", template {record.template}" if record.template else ""))]
    if record.score is not None:
        share = record.metric != "BLEU"
        text = format_share(record.score) if share else f"{record.score:.1f}"
        if record.score_low is not None:
            text += f" (95 % interval {format_interval(record.score_low, record.score_high)})"
        rows.append((record.metric or "score", text))
        rows.append(("rows", f"{record.num_rows} in {format_seconds(record.seconds)}"))
        rows.append(("exact match", format_share(record.exact_match)))
    if record.perplexity is not None:
        rows.append(("perplexity", f"{record.perplexity:.4g} over {record.num_tokens} tokens"))
    if record.kl_mean is not None:
        rows.append(
            (
                "KL to parent",
                f"{format_divergence(record.kl_mean)} nats/token (99th percentile {format_divergence(record.kl_p99)})",
            )
        )
        rows.append(("greedy agreement", format_share(record.greedy_agreement, digits=2)))
    if record.gate is not None:
        rows += [*task_lines(record.gate), ("gate", record.gate.verdict)]
        rows += [("reason", reason) for reason in record.gate.reasons]
    facts(console, record.model, rows)
    if record.by_kind and len(record.by_kind) > 1:
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        table.add_column("kind", style="dim")
        table.add_column("rows", justify="right")
        table.add_column("right", justify="right")
        for kind, score in sorted(record.by_kind.items()):
            table.add_row(kind, str(score["num_rows"]), format_share(score["score"]))
        print_table(console, table)
    wrong = [answer for answer in record.answers or [] if not answer["right"]]
    for answer in wrong[:num_wrong]:
        console.print()
        for name in ("question", "gold", "predicted", "error"):
            if answer.get(name):
                console.print(f"{name:>9}: {answer[name]}", soft_wrap=True)


def _percentiles(values: Mapping[str, float | None]) -> str:
    return " / ".join(format_milliseconds(values.get(name)) for name in ("p50", "p90", "p99"))


def show_bench(console: Console, result: BenchResult) -> None:
    """One engine's figures."""
    low, high = result.spread["total_tokens_per_s"]
    rows = [
        (
            "engine",
            ", ".join(
                filter(
                    None,
                    [
                        result.engine,
                        result.dtype,
                        result.quantization,
                        result.device,
                        f"{result.threads} thread{'' if result.threads == 1 else 's'}",
                    ],
                )
            ),
        ),
        (
            "workload",
            f"{result.num_requests} requests, {result.input_tokens} in + {result.output_tokens} out, "
            f"{result.concurrency} at once",
        ),
        (
            "throughput",
            f"{format_rate(result.total_tokens_per_s)} tokens/s in + out "
            f"({format_rate(low)} to {format_rate(high)} over {result.repeats}), "
            f"{format_rate(result.output_tokens_per_s)} out",
        ),
        ("TTFT p50/p90/p99", _percentiles(result.ttft_ms)),
        ("TPOT p50/p90/p99", _percentiles(result.tpot_ms)),
        (
            "times",
            f"load {format_seconds(result.load_s)}, optimise {format_seconds(result.optimise_s)}, "
            f"warm-up {format_seconds(result.warmup_s)}, steady {format_seconds(result.wall_s)}",
        ),
        (
            "memory",
            f"peak {format_bytes(result.peak_memory_bytes)}, weights {format_bytes(result.weights_bytes)}, "
            f"KV {format_bytes(result.kv_bytes)}",
        ),
    ]
    rows += [
        (
            f"rank {rank['rank']}",
            f"process {format_bytes(rank['resident_bytes'])}, weights {format_bytes(rank['weights_bytes'])}, "
            f"KV {format_bytes(rank['kv_bytes'])}",
        )
        for rank in result.ranks
    ]
    facts(console, result.model, rows)


def show_versus(console: Console, result: VersusResult) -> None:
    """Two engines and their ratios."""
    show_bench(console, result.first)
    console.print()
    show_bench(console, result.second)
    console.print()
    rows = []
    for name, value in result.ratio.items():
        low, high = result.ratio_spread[name]
        rows.append((name, f"{format_ratio(value)} ({format_ratio(low)} to {format_ratio(high)})"))
    facts(console, f"{result.first.engine} over {result.second.engine}, pair by pair", rows)
