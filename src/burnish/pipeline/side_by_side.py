"""Parent and child side by side as a run record, for a report: from a child's manifest, or from an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from burnish.errors import DataError
from burnish.measure.hardware import hardware_record, version_record
from burnish.measure.json_values import to_plain
from burnish.measure.report import render
from burnish.measure.run_record import RunRecord, Sample, SampleAnswer, Stage, Variant
from burnish.models.atomic_files import write_text
from burnish.models.loading import resolve_model
from burnish.pipeline.disk import weight_file_bytes
from burnish.pipeline.evaluate import EvalRecord
from burnish.pipeline.manifest import read_manifest
from burnish.pipeline.opening import Source

PARENT, CHILD = "parent", "child"


def run_of_child(folder: Path) -> RunRecord:
    """What a child's manifest says about it and its parent.

    Raises:
        DataError: the folder has no manifest, or no gate compared it.
        CheckpointError: the manifest is corrupt.
    """
    manifest = read_manifest(folder)
    if manifest is None or not isinstance(manifest.get("gate"), dict):
        raise DataError(f"{folder} holds no run, and no child that was held against a parent")
    inputs: Mapping[str, Any] = manifest.get("inputs") or {}
    parents = [str(each.get("path")) for each in inputs.values() if isinstance(each, dict)]
    figures: Mapping[str, Any] = manifest.get("figures") or {}
    kind, recorded = str(manifest.get("kind")), manifest.get("data") or {}
    stage = Stage(
        name=kind,
        seconds=figures.get("seconds"),
        predicted_peak_bytes=figures.get("predicted_peak_bytes"),
        measured_peak_bytes=figures.get("peak_memory_bytes"),
    )
    return _run(
        manifest["gate"],
        name=folder.name,
        created=str(manifest.get("created")),
        parent=" + ".join(parents),
        child=str(folder),
        data=str(recorded.get("eval_source") or ""),
        hardware=manifest.get("hardware") or {},
        versions=manifest.get("versions") or {},
        stages=[stage],
        settings={kind: manifest.get("config") or {}},
    )


def write_comparison(path: Path, record: EvalRecord, source: Source) -> None:
    """Write an evaluation beside a parent as a page (`.html`) or as Markdown (`.md`).

    Raises:
        DataError: nothing was compared.
    """
    gate = to_plain(record.gate) if record.gate is not None else None
    if gate is None:
        if record.against is None or record.kl_mean is None:
            raise DataError("there is nothing to report", remedy="Name the parent with --against.")
        names = ("kl_mean", "kl_p99", "greedy_agreement", "num_tokens")
        gate = {name: getattr(record, name) for name in names} | {"perplexity_child": record.perplexity}
    run = _run(
        gate,
        name=Path(record.model).name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        parent=record.against or "",
        child=record.model,
        data=record.data,
        hardware=hardware_record(),
        versions=version_record(),
        stages=[],
        settings={},
        source=source,
    )
    write_text(path, render(run, format=path.suffix.removeprefix(".")))


def _run(
    gate: Mapping[str, Any],
    *,
    name: str,
    created: str,
    parent: str,
    child: str,
    data: str,
    hardware: Mapping[str, Any],
    versions: Mapping[str, str],
    stages: Sequence[Stage],
    settings: Mapping[str, Any],
    source: Source | None = None,
) -> RunRecord:
    task: Mapping[str, Any] = gate.get("task") or {}
    rows = task.get("num_rows")
    variants = [
        Variant(
            name=PARENT,
            description=parent,
            disk_bytes=_weight_bytes(parent, source),
            score=task.get("parent_score"),
            score_low=task.get("parent_low"),
            score_high=task.get("parent_high"),
            num_rows=rows,
            perplexity=gate.get("perplexity_parent"),
        ),
        Variant(
            name=CHILD,
            parent=PARENT,
            description=child,
            disk_bytes=_weight_bytes(child, source),
            score=task.get("score"),
            score_low=task.get("score_low"),
            score_high=task.get("score_high"),
            num_rows=rows,
            perplexity=gate.get("perplexity_child"),
            kl_to_parent=gate.get("kl_mean"),
            kl_p99=gate.get("kl_p99"),
            greedy_agreement=gate.get("greedy_agreement"),
            verdict=gate.get("verdict"),
            reasons=list(gate.get("reasons") or []),
        ),
    ]
    compared = {
        "tokens compared": gate.get("num_tokens"),
        "perplexity": f"{_number(gate.get('perplexity_parent'))} → {_number(gate.get('perplexity_child'))}",
        "99th percentile of the KL": _number(gate.get("kl_p99")),
    }
    if task:
        compared |= {
            "answers lost": task["lost"],
            "answers gained": task["gained"],
            "answers reworded": task["reworded"],
            "chance of such a loss": f"{task['p_value']:.2g}",
        }
    kinds = {
        kind: f"{change['parent_right']} → {change['child_right']} of {change['num_rows']}"
        for kind, change in (task.get("by_kind") or {}).items()
    }
    limits = {key: value for key, value in (gate.get("limits") or {}).items() if value is not None}
    return RunRecord(
        name=name,
        created=created,
        model=child,
        task="text-to-sql" if task else "",
        data=data,
        metric=str(task.get("metric") or "execution accuracy"),
        hardware=dict(hardware),
        versions={key: str(value) for key, value in versions.items()},
        variants=variants,
        stages=list(stages),
        samples=[_sample(changed) for changed in task.get("changed") or []],
        settings={
            "parent → child": compared,
            "right answers by kind": kinds,
            "limits": limits,
            **settings,
        },
    )


def _sample(changed: Mapping[str, Any]) -> Sample:
    lost, error = bool(changed["lost"]), changed.get("error")
    return Sample(
        question=changed["question"],
        gold=changed["gold"],
        context=changed.get("context") or "",
        answers={
            PARENT: SampleAnswer(text=changed["parent"], right=lost, error=None if lost else error),
            CHILD: SampleAnswer(text=changed["child"], right=not lost, error=error if lost else None),
        },
    )


def _weight_bytes(model: str, source: Source | None) -> int | None:
    """Of the weight files; None where they are not here any more."""
    if Path(model).is_dir():
        return weight_file_bytes(Path(model))
    if source is None or not model or Path(model).exists():
        return None
    return weight_file_bytes(resolve_model(model, revision=source.revision, offline=True))


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}"
