"""The comparison's record as a table, each peer's figures over burnish's of the same round."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

OURS = "burnish"


def report_of(record: dict[str, Any]) -> str:
    """The record in Markdown; ratios are those of each round's own figures."""
    facts, results = record["hardware"], record["results"]
    versions = {name: text for result in results for name, text in result["versions"].items()}
    loads = [result["load_average"] for result in results]
    model = record["model"]
    lines = [
        f"# GPTQ beside its peers, {record['date']}",
        "",
        f"{model['numbers']:,} numbers, {model['num_layers']} layers of {model['hidden_size']}, bfloat16; "
        f"{record['bits']} bits in groups of {record['group_size']}, "
        f"{record['samples']} x {record['length']} calibration tokens. "
        f"{facts['cpu']}, {facts['cores']} cores; {record['threads']} threads. "
        f"{', '.join(f'{name} {text}' for name, text in versions.items())}. "
        f"Load average before each turn: {min(loads, default=0)} to {max(loads, default=0)}.",
        "",
        "Median (least to most) of the rounds; loading and writing are not in them. CPU seconds are those of all "
        "threads and suffer least from other work on the machine. Memory is over the loaded model.",
        "",
        "| | wall s | x ours | CPU s | x ours | over the model MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(result["system"] for result in results):
        mine = [result for result in results if result["system"] == name]
        cells = []
        for key in ("wall_s", "cpu_s"):
            cells += [_spread([result[key] for result in mine]), _ratio(results, mine, key)]
        cells.append(_spread([result["increase_mib"] for result in mine]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"\nFailed in round {fail['round']}: {fail['name']}: {fail['error']}" for fail in record["failures"]]
    return "\n".join(lines) + "\n"


def _ratio(results: list[dict[str, Any]], mine: list[dict[str, Any]], key: str) -> str:
    ours = {result["round"]: result[key] for result in results if result["system"] == OURS}
    pairs = [result[key] / ours[result["round"]] for result in mine if result["round"] in ours]
    return f"{median(pairs):.1f}" if pairs else "-"


def _spread(values: list[float]) -> str:
    middle = f"{median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f} to {max(values):.1f})"
