"""From the records of measurements to rows beside the project's targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from limits import batch_limit
from session import MIB, percent, spread

from burnish.models.loading import load_config


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the table. `good` is None where nothing is promised."""

    work: str
    config: str
    figure: str
    value: str
    target: str = "-"
    good: bool | None = None


def lines_of(measured: list[dict[str, Any]], *, model: Path) -> list[Line]:
    """The rows of all measurements, in their order.

    Args:
        measured: records of the scripts, each with the `config` that it ran in.
        model: folder of the model that W1 ran on.
    """
    limits = next((entry for entry in measured if entry["work"] == "limits"), None)
    lines: list[Line] = []
    for entry in measured:
        lines += {
            "limits": _limits_lines,
            "w1": lambda one: _w1_lines(one, limits, model),
            "w2": lambda one: _w2_lines(one, limits),
            "w3": _w3_lines,
            "w4": _w4_lines,
            "w5": _w5_lines,
            "w6": _w6_lines,
            "memory": _memory_lines,
            "quality": _quality_lines,
        }[entry["work"]](entry)
    return lines


def _limits_lines(entry: dict[str, Any]) -> list[Line]:
    rates = {f"read, threads: {threads}": f"{rate:.1f} GB/s" for threads, rate in entry["read"]["gb_per_s"].items()}
    for kind, by_rows in entry["gemm"]["gop_per_s"].items():
        rates |= {f"{kind} matrices, {rows} rows": f"{rate:.0f} Gop/s" for rows, rate in by_rows.items() if rows != "1"}
    return [Line(work="limits", config="-", figure=name, value=value) for name, value in rates.items()]


def _w1_lines(entry: dict[str, Any], limits: dict[str, Any] | None, model: Path) -> list[Line]:
    config = entry["config"]
    rate = median(entry["total_tokens_per_s"])
    share = ""
    rates = None if limits is None else limits["gemm"]["gop_per_s"].get("bfloat16" if config == "bf16" else "int8")
    if rates is not None and {"32", "512"} <= set(rates):
        sizes = {name: entry[name] for name in ("requests", "input_tokens", "output_tokens")}
        bound = batch_limit(
            load_config(model),
            rates,
            requests=sizes["requests"],
            tokens_in=sizes["input_tokens"],
            tokens_out=sizes["output_tokens"],
        )
        share = f", {rate / bound:.2f} of oneDNN's matrices"
    return [
        Line(
            work="W1",
            config=config,
            figure="total tokens/s",
            value=spread(entry["total_tokens_per_s"]) + share,
            target="see compare.py",
        ),
        _overhead("W1", entry, 0.05),
        Line(
            work="W1",
            config=config,
            figure="peak RSS",
            value=f"{entry['peak_rss_mib']:.0f} MiB",
            target=f"at most {entry['peak_rss_limit_mib']:.0f} MiB",
            good=entry["peak_rss_mib"] <= entry["peak_rss_limit_mib"],
        ),
    ]


def _w2_lines(entry: dict[str, Any], limits: dict[str, Any] | None) -> list[Line]:
    config = entry["config"]
    rate = median(entry["decode_tokens_per_s"])
    lines = [
        Line(
            work="W2",
            config=config,
            figure="decode tokens/s",
            value=spread(entry["decode_tokens_per_s"], 2),
            target="see compare.py",
        ),
        Line(
            work="W2", config=config, figure="TTFT", value=f"{spread(entry['ttft_ms'], 0)} ms", target="see compare.py"
        ),
    ]
    if limits is not None:
        read = limits["read"]["gb_per_s"][str(entry["threads"])] * 1e9
        share = rate / (read / entry["bytes_read_per_token"])
        promised = config == "int8"
        lines.append(
            Line(
                work="W2",
                config=config,
                figure=f"of the memory limit ({entry['bytes_read_per_token'] / MIB:.0f} MiB a token)",
                value=f"{share:.3f}",
                target="at least 0.9" if promised else "-",
                good=share >= 0.9 if promised else None,
            )
        )
    return [*lines, _overhead("W2", entry, 0.1)]


def _overhead(work: str, entry: dict[str, Any], most: float) -> Line:
    share = entry["overhead_of_steps"]
    return Line(
        work=work,
        config=entry["config"],
        figure="outside the backend",
        value=f"{percent(share)} of steps, {percent(entry['overhead_of_wall'])} of wall",
        target=f"under {percent(most, 0)} of steps",
        good=share < most,
    )


def _w3_lines(entry: dict[str, Any]) -> list[Line]:
    config, lines = entry["config"], []
    for load, name in (("offered", "80 % offered"), ("overload", "overloaded")):
        one = entry[load]
        rates, of_w1 = one["tokens_per_s"], one["share_of_w1"]
        full = of_w1["when_full"]
        lines.append(
            Line(
                work="W3",
                config=config,
                figure=f"{name}: tokens/s, all",
                value=f"{rates['all']:.0f}, {of_w1['all']:.2f} of W1, {rates['all'] / one['arrived_tokens_per_s']:.2f} "
                f"of what arrived; {rates['kept']:.0f} within the limits "
                f"({one['kept_requests']} of {entry['requests']} requests)",
            )
        )
        if load == "overload":
            lines.append(
                Line(
                    work="W3",
                    config=config,
                    figure=f"{name}: tokens/s, when full",
                    value="never full" if full is None else f"{rates['when_full']:.0f}, {full:.2f} of W1",
                    target="at least 0.85 of W1",
                    good=None if full is None else full >= 0.85,
                )
            )
        for key in ("ttft_ms", "tpot_ms") if load == "offered" else ():
            value = " / ".join(f"{one[key][mark]:.0f}" for mark in ("p50", "p90", "p99"))
            figure = f"{name}: {key[:4].upper()} ms p50 / p90 / p99"
            lines.append(Line(work="W3", config=config, figure=figure, value=value))
    return lines


def _w4_lines(entry: dict[str, Any]) -> list[Line]:
    return [
        Line(
            work="W4",
            config=entry["config"],
            figure=f"prefix caching, {count} at a time",
            value=f"{spread(one['ratios'], 2)} times as fast",
            target="at least 1.8",
            good=median(one["ratios"]) >= 1.8,
        )
        for count, one in entry["by_concurrency"].items()
    ]


def _w5_lines(entry: dict[str, Any]) -> list[Line]:
    return [
        Line(
            work="W5",
            config="float32" if name == "real" else entry["config"],
            figure=f"speculation, {name}",
            value=f"{spread(one['ratios'], 2)} times ({one['rate_off']:.1f} to {one['rate_on']:.1f} tokens/s; "
            f"{one['tokens_per_step']:.2f} tokens a step)",
            target="at least 1.6",
            good=median(one["ratios"]) >= 1.6,
        )
        for name in ("scripted", "rows", "real")
        if (one := entry.get(name)) is not None
    ]


def _w6_lines(entry: dict[str, Any]) -> list[Line]:
    ways, time_saved = entry["ways"], entry["time_saved"]
    lines = []
    if "uncached" in time_saved:
        saved = time_saved["uncached"]
        lines.append(
            Line(
                work="W6",
                config=entry["dtype"],
                figure="time saved by the cache",
                value=f"{percent(saved)} ({ways['uncached']['wall_s']:.1f} to {ways['cached']['wall_s']:.1f} s)",
                target="over 84.4 %",
                good=saved > 0.844,
            )
        )
    for way, promised in (("plain", True), ("uncached", False)):
        if way in ways:
            saved = entry["memory_saved"][way]
            growth = entry["memory_growth_saved"][way]
            lines.append(
                Line(
                    work="W6",
                    config=entry["dtype"],
                    figure=f"peak memory saved, against {way}",
                    value=f"{percent(growth)} ({percent(saved)} of the whole process)",
                    target="over 29 %" if promised else "-",
                    good=growth > 0.29 if promised else None,
                )
            )
    return lines


def _memory_lines(entry: dict[str, Any]) -> list[Line]:
    return [
        Line(
            work="memory",
            config=name,
            figure="peak of loading over its end",
            value=f"{one['peak_over_end']:.2f} ({one['growth_mib']:.0f} over {one['end_mib']:.0f} MiB; "
            f"weights {one['weights_mib']:.0f})",
            target="at most 1.3",
            good=one["peak_over_end"] <= 1.3,
        )
        for name, one in entry["loads"].items()
    ]


def _quality_lines(entry: dict[str, Any]) -> list[Line]:
    lines = []
    for subject, kinds in entry["kl"].items():
        for kind, one in kinds.items():
            promised = kind.startswith("int8")
            lines.append(
                Line(
                    work="KL",
                    config=kind,
                    figure=subject,
                    value=f"{one['kl_mean']:.2g} nats/token",
                    target="at most 0.01" if promised else "-",
                    good=one["kl_mean"] <= 0.01 if promised else None,
                )
            )
    for kind, one in entry.get("answers", {}).items():
        promised = kind == "int8"
        lines.append(
            Line(
                work="answers",
                config="float32" if kind == "none" else kind,
                figure=f"right, of {one['num_rows']}",
                value=f"{percent(one['score'], 2)} ({one['lost']} lost, {one['won']} won)",
                target="0.5 points at most below float32" if promised else "-",
                good=one["drop"] <= 0.005 if promised else None,
            )
        )
    return lines
