"""The report of a run: the JSON that the command line promises, the headline, and the choice of a format. Torch-free.

Tables for people are in `report_text.py`, the HTML page in `report_html.py`, its plots in `report_plots.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from burnish.errors import ConfigError
from burnish.measure.formatting import format_ratio, format_share, ratio
from burnish.measure.run_record import (
    DtypeShare,
    LossPoint,
    RunRecord,
    Sample,
    SampleAnswer,
    Stage,
    Variant,
    read_run,
)

__all__ = [
    "FORMATS",
    "DtypeShare",
    "Headline",
    "LossPoint",
    "RunRecord",
    "Sample",
    "SampleAnswer",
    "Stage",
    "Variant",
    "build_report",
    "combine_runs",
    "headline",
    "read_run",
    "render",
]

FORMATS = ("table", "md", "csv", "json", "html")

_VARIANT_FIELDS = (
    "name",
    "disk_bytes",
    "peak_memory_bytes",
    "ttft_ms",
    "output_tokens_per_s_1",
    "output_tokens_per_s_8",
    "score",
    "score_low",
    "score_high",
    "kl_to_parent",
    "verdict",
)
_STAGE_FIELDS = ("name", "seconds", "predicted_peak_bytes", "measured_peak_bytes")


def build_report(run: RunRecord | dict[str, Any]) -> dict[str, Any]:
    """The document of `burnish report --format json`: variants and stages, null for what was not measured.

    Raises:
        DataError: `run` is a dict that is not a run record.
    """
    record = (run if isinstance(run, RunRecord) else RunRecord.from_dict(run)).to_dict()
    return {
        "variants": [{name: variant[name] for name in _VARIANT_FIELDS} for variant in record["variants"]],
        "stages": [{name: stage[name] for name in _STAGE_FIELDS} for stage in record["stages"]],
    }


def render(run: RunRecord, *, format: str = "table", width: int = 100, color: bool = False) -> str:
    """The report as text in one of `FORMATS`.

    Args:
        run: what to report.
        format: table, md, csv, json or html.
        width: columns of the terminal, for the table.
        color: write ANSI colours into the table.

    Raises:
        ConfigError: the format is unknown.
    """
    if format == "json":
        return json.dumps(build_report(run), indent=2, ensure_ascii=False) + "\n"
    if format == "html":
        from burnish.measure.report_html import render_html  # matplotlib is slow to import

        return render_html(run)
    from burnish.measure import report_text

    if format == "table":
        return report_text.render_table(run, width=width, color=color)
    if format == "md":
        return report_text.render_markdown(run)
    if format == "csv":
        return report_text.render_csv(run)
    raise ConfigError("unknown report format", got=repr(format), expected=", ".join(FORMATS))


def combine_runs(runs: Sequence[RunRecord]) -> RunRecord:
    """Several runs as one, for a report side by side: variants and stages are named `run/variant`.

    The newest run's samples, loss curve, hardware and settings stand for all.

    Raises:
        ConfigError: there is no run.
    """
    if not runs:
        raise ConfigError("there is no run to report")
    if len(runs) == 1:
        return runs[0]
    newest = max(runs, key=lambda run: run.created)
    taken: dict[str, int] = {}
    names: list[str] = []
    for run in runs:  # two runs may bear one name
        taken[run.name] = taken.get(run.name, 0) + 1
        names.append(run.name if taken[run.name] == 1 else f"{run.name}~{taken[run.name]}")
    label = names[next(number for number, run in enumerate(runs) if run is newest)]
    return replace(
        newest,
        name=" + ".join(names),
        variants=[
            replace(variant, name=f"{name}/{variant.name}", parent=variant.parent and f"{name}/{variant.parent}")
            for name, run in zip(names, runs)
            for variant in run.variants
        ],
        stages=[replace(stage, name=f"{name}/{stage.name}") for name, run in zip(names, runs) for stage in run.stages],
        samples=[
            replace(sample, answers={f"{label}/{name}": answer for name, answer in sample.answers.items()})
            for sample in newest.samples
        ],
    )


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The run in one line: `pass`, `fail` or `none` (no gate judged anything), and what to say."""

    verdict: str
    title: str
    sentences: tuple[str, ...]


def headline(run: RunRecord) -> Headline:
    """Say what came out, in the order in which one asks: did the gates pass, is it better, how small did it get."""
    failed = [variant.name for variant in run.variants if variant.verdict == "fail"]
    passed = [variant.name for variant in run.variants if variant.verdict == "pass"]
    stopped = [stage.name for stage in run.stages if stage.status == "failed"]
    if stopped:
        verdict, title = "fail", f"Stopped at {_listed(stopped)}"
    elif failed:
        verdict, title = "fail", f"{_listed(failed)} failed {'its gate' if len(failed) == 1 else 'their gates'}"
    elif passed:
        verdict = "pass"
        title = f"All {len(passed)} gates passed" if len(passed) > 1 else f"{passed[0]} passed its gate"
    elif run.training and not run.variants:
        verdict, title = "none", f"Tuned for {run.training[-1].step} steps; no gate was run"
    else:
        verdict, title = "none", "No gate was run"
    sentences = [_quality_sentence(run), _size_sentence(run)]
    return Headline(verdict=verdict, title=title, sentences=tuple(text for text in sentences if text))


def _quality_sentence(run: RunRecord) -> str | None:
    base, tuned = run.variant("base"), run.variant("tuned")
    if base is None or tuned is None or base.score is None or tuned.score is None:
        return None
    change = "raised" if tuned.score > base.score else "lowered" if tuned.score < base.score else "left"
    if change == "left":
        return f"Tuning left {run.metric} at {format_share(tuned.score)}."
    return f"Tuning {change} {run.metric} from {format_share(base.score)} to {format_share(tuned.score)}."


def _size_sentence(run: RunRecord) -> str | None:
    """The smallest variant that passed its gate, against its parent."""
    small = [v for v in run.variants if v.verdict == "pass" and v.disk_bytes and v.parent]
    best = min(small, key=lambda variant: variant.disk_bytes or 0, default=None)
    parent = run.variant(best.parent) if best is not None and best.parent else None
    if best is None or parent is None or not parent.disk_bytes or not best.disk_bytes:
        return None
    times = ratio(parent.disk_bytes, best.disk_bytes)
    if times is None or times < 1.05:
        return None
    sentence = f"{best.name} is {format_ratio(times)} smaller on disk than {parent.name}"
    if best.score is None or parent.score is None:
        return sentence + "."
    points = 100 * (best.score - parent.score)
    if abs(points) < 0.05:
        return sentence + " and answers as well."
    word = "gains" if points > 0 else "loses"
    return f"{sentence} and {word} {abs(points):.1f} {'point' if f'{abs(points):.1f}' == '1.0' else 'points'}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
