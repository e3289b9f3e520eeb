"""`plan`: what a model will need on a device, stage by stage, before anything is downloaded or loaded. Torch-free."""

from __future__ import annotations

from dataclasses import replace

from burnish.plan.options import PlanOptions
from burnish.plan.predict import Plan
from burnish.plan.predict import plan as predict
from burnish.plan.source import find_model
from burnish.plan.stages import STAGES


def plan(
    model: str,
    *,
    device: str = "cpu",
    options: PlanOptions | None = None,
    stages: tuple[str, ...] | None = None,
    cards: int = 1,
    revision: str | None = None,
    offline: bool = False,
) -> Plan:
    """Predict memory and time.

    Args:
        model: folder, bundled name, hub id (only config.json is fetched), or a published shape.
        device: a name of the catalogue; "cpu" and "cuda" are this machine's.
        options: the work: lengths, batches, formats.
        stages: names of stages; all when None.
        cards: devices of this kind that share the model.

    Raises:
        CheckpointError, ConfigError: an unknown model, device or stage.
    """
    source = find_model(model, revision=revision, offline=offline)
    work = options or PlanOptions()
    if work.weight_format is None and source.weight_format is not None:
        work = replace(work, weight_format=source.weight_format, group_size=source.group_size or work.group_size)
    return predict(
        source.config,
        model=source.name,
        device=device,
        options=work,
        stored_dtype=source.stored_dtype,
        stages=stages or tuple(STAGES),
        cards=cards,
    )
