"""What an engine did to the weights while it loaded them, in lines for people."""

from __future__ import annotations

from typing import Any

from burnish.compress.optimise import OptimiseReport
from burnish.measure.formatting import format_bytes, format_seconds

_PHASES = (
    ("hash_s", "hash"),
    ("read_s", "read"),
    ("quantize_s", "quantize"),
    ("check_s", "compare"),
    ("write_s", "keep"),
)


def optimised_lines(engine: Any) -> list[str]:
    """What to say of an engine's weights: nothing where they are as the user asked and the files have them."""
    report: OptimiseReport | None = getattr(engine, "optimised", None)
    if report is None:
        return []
    lines = list(report.notes)
    if report.quantize == "none":
        return [*lines, f"not quantized: {report.reason}"] if report.asked == "auto" else lines
    phases = ", ".join(
        f"{name} {format_seconds(getattr(report, field))}" for field, name in _PHASES if getattr(report, field) >= 0.01
    )
    source = "kept from an earlier load" if report.cached else f"kept in {report.cache}" if report.cache else "not kept"
    lines.append(
        f"quantized to {report.quantize} in {format_seconds(report.seconds)} ({phases}): "
        f"{format_bytes(report.bytes_before)} of weights became {format_bytes(report.bytes_after)}; {source}"
    )
    if report.asked == "auto":
        lines.append(f"chosen because {report.reason}")
    return lines
