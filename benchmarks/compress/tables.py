"""The study's record as Markdown tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peers.table import aligned

from burnish.measure.formatting import format_divergence, format_interval, format_seconds, format_share

MIB = 1024**2
TITLES = {
    "sql": "The bundled model, tuned and merged, on text-to-SQL",
    "135m": "The shape of 135M, random weights: sizes and speeds",
    "1.1b": "The shape of 1.1B, random weights: sizes and speeds",
}
QUALITY = ("accuracy %", "95 %", "lost / gained", "negations", "perplexity", "KL", "KL p99", "agree %", "gate")
SIZES = ("made in", "peak MiB", "disk MiB", "load s", "load MiB", "run MiB", "tok/s at 1", "tok/s at 8")


def report_of(record: dict[str, Any]) -> str:
    """All tables; a group without a result is left out."""
    machine = record["hardware"]
    lines = [
        "# Compression: every method on the same model",
        "",
        f"{record['date']}, {machine.get('cpu')}, {machine.get('cores')} cores, "
        f"torch {record['versions'].get('torch')}. See benchmarks/compress/README.md for what the columns mean.",
        "",
    ]
    for work, title in TITLES.items():
        entries = [entry for entry in record["variants"] if entry["work"] == work]
        if any("disk_bytes" in entry for entry in entries):
            lines += [f"## {title}", "", *_works_table(entries), *_reasons(entries), ""]
    if record["peers"]:
        lines += ["## stories260k, one scale per output channel", "", *stories_tables(record["peers"]), ""]
        lines += [*_reasons(record["peers"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _works_table(entries: Sequence[dict[str, Any]]) -> list[str]:
    found = [entry for entry in entries if "disk_bytes" in entry]
    scored = any("quality" in entry for entry in found)
    rows = [["variant", *SIZES, *(QUALITY if scored else ())]]
    rows += [[entry["name"], *_size_cells(entry), *(_quality_cells(entry) if scored else [])] for entry in found]
    return aligned(rows).splitlines()


def _size_cells(entry: dict[str, Any]) -> list[str]:
    made, speed = entry.get("made", {}), entry.get("speed", {})
    return [
        format_seconds(made["seconds"]) if "seconds" in made else "–",
        _mib(made.get("peak_memory_bytes")),
        _mib(entry["disk_bytes"]),
        _number(entry.get("load_seconds"), 2),
        _mib(entry.get("load_memory_bytes")),
        _mib(entry.get("inference_memory_bytes")),
        _number(speed.get("output_tokens_per_s_1"), 0),
        _number(speed.get("output_tokens_per_s_8"), 0),
    ]


def _quality_cells(entry: dict[str, Any]) -> list[str]:
    if "quality" not in entry:
        return ["–"] * len(QUALITY)
    task, distance = entry["quality"]["task"], entry["quality"]["distance"]
    negation = task["by_kind"].get("negation")
    return [
        f"{100 * task['score']:.1f}",
        format_interval(task["score_low"], task["score_high"]),
        f"{task['lost']} / {task['gained']}",
        "–" if negation is None else f"{negation['child_right']} of {negation['num_rows']}",
        f"{distance['perplexity_child']:.3f}",
        format_divergence(distance["kl_mean"]),
        format_divergence(distance["kl_p99"]),
        format_share(distance["greedy_agreement"], digits=2).removesuffix(" %"),
        entry["quality"].get("verdict") or "–",
    ]


def stories_tables(peers: Sequence[dict[str, Any]]) -> list[str]:
    """A table for each width: all programs' schemes, the best first."""
    rows = [row for peer in peers for row in peer.get("rows", [])]
    lines: list[str] = []
    for bits in sorted({row["bits"] for row in rows if "bits" in row}, reverse=True):
        found = sorted((row for row in rows if row.get("bits") == bits), key=lambda row: row["perplexity"])
        table = [["program", "scheme", "perplexity", "KL", "agree %", "seconds"]]
        table += [
            [
                row["tool"],
                row["name"],
                f"{row['perplexity']:.3f}",
                f"{row['kl_mean']:.4f}",
                f"{100 * row['greedy_agreement']:.1f}",
                f"{row['seconds']:.1f}",
            ]
            for row in found
        ]
        lines += [f"{bits} bits (float32: {found[0]['perplexity_parent']:.3f})", "", *aligned(table).splitlines(), ""]
    failed = [row for row in rows if "error" in row]
    lines += [f"- {row['tool']}, {row['name']}: {row['error'][:160]}" for row in failed]
    return lines


def _reasons(entries: Sequence[dict[str, Any]]) -> list[str]:
    told = [f"- {entry['name']}: {entry['reason']}" for entry in entries if entry.get("reason")]
    return ["", *told] if told else []


def _mib(value: float | None) -> str:
    return "–" if value is None else f"{value / MIB:.1f}" if value < 100 * MIB else f"{value / MIB:.0f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
