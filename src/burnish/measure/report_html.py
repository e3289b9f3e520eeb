"""The report as one HTML page that needs nothing else: no script, no font, no request. Torch-free.

Everything shown is formatted here; `templates/report.html.j2` only lays it out, and escapes every text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from difflib import SequenceMatcher
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from burnish.measure.formatting import (
    MISSING,
    format_bytes,
    format_count,
    format_divergence,
    format_interval,
    format_milliseconds,
    format_rate,
    format_ratio,
    format_seconds,
    format_share,
    is_missing,
)
from burnish.measure.report import headline
from burnish.measure.report_plots import draw_plots
from burnish.measure.report_text import peak_ratio, stage_time
from burnish.measure.run_record import LossPoint, RunRecord, Sample, Stage, Variant

MOST_SAMPLES = 40
_WORD = re.compile(r"\s+|'[^']*'|\w+|[^\w\s]")


def render_html(run: RunRecord) -> str:
    """The page. The same record gives the same bytes."""
    environment = Environment(
        loader=PackageLoader("burnish.measure", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    summary = headline(run)
    page = environment.get_template("report.html.j2").render(
        title=f"{run.model or run.name} · burnish report",
        model=run.model or run.name,
        subtitle=_subtitle(run),
        made_on=_made_on(run),
        summary=summary,
        tiles=_tiles(run),
        metric=run.metric,
        variants=[_variant_cells(variant) for variant in run.variants],
        notes=[(variant.name, variant.reasons) for variant in run.variants if variant.reasons],
        rows_note=_rows_note(run),
        plots=[(plot, Markup(plot.svg)) for plot in draw_plots(run)],
        loss_ends=[_last_loss(run.loss), _last_loss(run.eval_loss)],
        stages=[_stage_cells(stage) for stage in run.stages],
        stages_total=format_seconds(sum(stage.seconds or 0 for stage in run.stages)) if run.stages else MISSING,
        dtypes=_dtype_rows(run.variants),
        samples=[_sample_cells(sample, run.variants) for sample in run.samples[:MOST_SAMPLES]],
        environment=_environment(run),
        settings=_settings(run.settings),
    )
    return page.strip() + "\n"


def _subtitle(run: RunRecord) -> list[str]:
    parts = [run.task, f"{format_count(run.parameters)} parameters" if run.parameters else "", f"run {run.name}"]
    return [part for part in parts if part]


def _made_on(run: RunRecord) -> list[str]:
    machine = run.hardware
    parts = [
        _date(run.created),
        str(machine.get("accelerator") or machine.get("cpu") or ""),
        f"{machine['cores']} cores" if machine.get("cores") else "",
        format_bytes(machine["memory_bytes"]) if machine.get("memory_bytes") else "",
        f"torch {run.versions['torch']}" if run.versions.get("torch") else "",
    ]
    return [part for part in parts if part]


def _date(text: str) -> str:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return text
    if moment.tzinfo is not None:
        moment = moment.astimezone(timezone.utc)
    return f"{moment.day} {moment:%B %Y, %H:%M}" + (" UTC" if moment.tzinfo else "")


def _tiles(run: RunRecord) -> list[dict[str, str]]:
    """The few figures one asks for first: each from where to where."""
    base, tuned = run.variant("base"), run.variant("tuned")
    passed = [variant for variant in run.variants if variant.verdict == "pass" and variant.disk_bytes]
    small = min(passed, key=lambda variant: variant.disk_bytes or 0, default=None)
    parent = run.variant(small.parent) if small is not None and small.parent else None
    tiles = []
    if base and tuned and base.score is not None and tuned.score is not None:
        tiles.append(_tile(run.metric, format_share(base.score), format_share(tuned.score), "base → tuned"))
    if small is not None and parent is not None and parent.disk_bytes:
        note = f"{parent.name} → {small.name}"
        tiles.append(_tile("disk", format_bytes(parent.disk_bytes), format_bytes(small.disk_bytes), note))
        if parent.output_tokens_per_s_8 and small.output_tokens_per_s_8:
            before, after = parent.output_tokens_per_s_8, small.output_tokens_per_s_8
            tiles.append(_tile("output tokens/s at 8", format_rate(before), format_rate(after), note))
        elif parent.peak_memory_bytes and small.peak_memory_bytes:
            before, after = parent.peak_memory_bytes, small.peak_memory_bytes
            tiles.append(_tile("peak memory", format_bytes(before), format_bytes(after), note))
    if run.seconds is not None:
        count = len(run.stages)
        tiles.append(_tile("whole run", "", format_seconds(run.seconds), f"{count} stages" if count else ""))
    return tiles


def _tile(label: str, before: str, after: str, note: str) -> dict[str, str]:
    return {"label": label, "before": before, "after": after, "note": note}


def _variant_cells(variant: Variant) -> dict[str, Any]:
    scored = variant.score is not None
    whisker = None
    if variant.score is not None and variant.score_low is not None and variant.score_high is not None:
        whisker = tuple(f"{100 * value:.1f}" for value in (variant.score_low, variant.score, variant.score_high))
    return {
        "name": variant.name,
        "description": variant.description,
        "disk": format_bytes(variant.disk_bytes),
        "peak": format_bytes(variant.peak_memory_bytes),
        "ttft": format_milliseconds(variant.ttft_ms),
        "rate_1": format_rate(variant.output_tokens_per_s_1),
        "rate_8": format_rate(variant.output_tokens_per_s_8),
        "score": format_share(variant.score),
        "interval": format_interval(variant.score_low, variant.score_high) if scored else "",
        "whisker": whisker,
        "kl": format_divergence(variant.kl_to_parent),
        "agreement": format_share(variant.greedy_agreement),
        "verdict": variant.verdict,
    }


def _rows_note(run: RunRecord) -> str:
    counts = {variant.num_rows for variant in run.variants if variant.num_rows}
    rows = f" on {counts.pop():,} held-out rows" if len(counts) == 1 else ""
    metric = run.metric[:1].upper() + run.metric[1:]
    parents = {variant.parent for variant in run.variants if variant.parent and variant.kl_to_parent is not None}
    against = " KL (nats per token) and agreement are against the variant's parent." if parents else ""
    memory = "Peak memory is what the process grew by, from before loading to the last answer."
    return f"{metric}{rows}, with Wilson's 95 % interval. {memory}{against}"


def _stage_cells(stage: Stage) -> dict[str, Any]:
    parts = sorted(((size, name) for name, size in stage.components.items() if size), reverse=True)
    return {
        "name": stage.name,
        "time": stage_time(stage),
        "failed": stage.status == "failed",
        "predicted": format_bytes(stage.predicted_peak_bytes),
        "measured": format_bytes(stage.measured_peak_bytes),
        "ratio": format_ratio(peak_ratio(stage)),
        "components": ", ".join(f"{name} {format_bytes(size)}" for size, name in parts) or MISSING,
        "note": stage.note,
    }


def _last_loss(points: Sequence[LossPoint]) -> str:
    return f"{points[-1].loss:.3f}" if points and not is_missing(points[-1].loss) else ""


def _dtype_rows(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """One group per distinct table: variants that hold the same tensors share it."""
    groups: list[dict[str, Any]] = []
    for variant in variants:
        if not variant.dtypes:
            continue
        known = next((group for group in groups if group["table"] == variant.dtypes), None)
        if known is not None:
            known["names"].append(variant.name)
            continue
        groups.append({"table": variant.dtypes, "names": [variant.name]})
    for group in groups:
        group["label"] = ", ".join(group["names"])
        group["rows"] = [
            {
                "dtype": row.dtype,
                "elements": format_count(row.elements),
                "bytes": format_bytes(row.bytes),
                "share": format_share(row.share),
                "width": f"{100 * min(max(row.share, 0.0), 1.0):.1f}",
            }
            for row in group["table"]
        ]
    return groups


def _sample_cells(sample: Sample, variants: Sequence[Variant]) -> dict[str, Any]:
    order = [variant.name for variant in variants if variant.name in sample.answers]
    order += [name for name in sample.answers if name not in order]
    answers = []
    for name in order:
        answer = sample.answers[name]
        text = answer.text.strip()
        wrong = answer.right is False
        answers.append(
            {
                "name": name,
                "right": answer.right,
                "text": mark_differences(sample.gold, text) if wrong else escape(text),
                "empty": not text,
                "error": answer.error if wrong and text else None,
            }
        )
    return {"question": sample.question, "context": sample.context.strip(), "gold": sample.gold, "answers": answers}


def mark_differences(gold: str, answer: str) -> Markup:
    """The answer escaped, with `<mark>` around what the expected one does not have at that place.

    An answer that has less than half in common is left unmarked: marks everywhere would point at nothing.
    """
    expected, given = _WORD.findall(gold), _WORD.findall(answer)
    matcher = SequenceMatcher(None, [word.lower() for word in expected], [word.lower() for word in given], False)
    if matcher.ratio() < 0.5:
        return escape(answer)
    parts: list[Markup] = []
    for action, _, _, begin, end in matcher.get_opcodes():
        piece = escape("".join(given[begin:end]))
        if piece:
            parts.append(piece if action == "equal" else Markup("<mark>{}</mark>").format(piece))
    return Markup("").join(parts)


def _environment(run: RunRecord) -> list[tuple[str, str]]:
    machine = dict(run.hardware)
    pairs: list[tuple[str, str]] = [("created", run.created)]
    pairs += [(name, value) for name, value in (("data", run.data), ("task", run.task)) if value]
    if "memory_bytes" in machine:
        machine["memory"] = format_bytes(machine.pop("memory_bytes"))
    pairs += [(name.replace("_", " "), _said(value)) for name, value in machine.items() if value not in (None, "", [])]
    pairs += [(name, value) for name, value in run.versions.items()]
    return pairs


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, pairs) per stage; values that stand outside a stage come first, without a heading."""
    loose = [(name, _said(value)) for name, value in settings.items() if not isinstance(value, Mapping)]
    groups = [
        (name, [(key.replace("_", " "), _said(item)) for key, item in value.items()])
        for name, value in settings.items()
        if isinstance(value, Mapping) and value
    ]
    return ([("general", loose)] if loose else []) + groups


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return MISSING
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_said(item) for item in value) or MISSING
    return f"{value:g}" if isinstance(value, float) else str(value)
