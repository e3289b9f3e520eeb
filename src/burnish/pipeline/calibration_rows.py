"""The rows that a child is calibrated on and trained with, which its gate must not be held on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from burnish.data.rows import TASK
from burnish.errors import DataError
from burnish.pipeline.examples import DataConfig, held_out_config, prepare
from burnish.pipeline.opening import Opened, data_of
from burnish.pipeline.training_data import Row

DEFAULT = f"{TASK}:train"


def calibration_rows(
    parent: Opened, calibration: str | None, *, template: str, limit: int
) -> tuple[Sequence[Row], str]:
    """Examples for a child, and the source they come from.

    Args:
        calibration: the source; by default the training rows that the parent's manifest names, else the bundled task's.
        template: how they are rendered, where the manifest does not say.
        limit: rows at most.

    Raises:
        DataError: nothing usable.
    """
    recorded = data_of(parent) or {}
    chosen = calibration or recorded.get("source") or DEFAULT
    columns = recorded.get("columns") if chosen == recorded.get("source") else None
    rows = DataConfig(
        source=str(chosen),
        template=str(recorded.get("template") or template),
        columns=columns if isinstance(columns, dict) else None,
        limit=limit,
    )
    prepared = prepare(rows, parent.tokenizer, longest=parent.decoder.config.max_position_embeddings)
    return prepared.examples.examples, str(chosen)


def refuse_gate_rows(calibration: str | None, *, data: str | None, recorded: Mapping[str, object] | None) -> None:
    """Make sure that a gate's rows are not those that the child was made with.

    Args:
        calibration: the source of those; None for none.
        data, recorded: as for `examples.held_out`.

    Raises:
        DataError: they come from the same file, hub data set or split of the bundled task.
    """
    held_out = held_out_config(data=data, recorded=recorded).source
    if calibration is not None and _same_rows(held_out) == _same_rows(calibration):
        raise DataError(
            "the gate's rows are the calibration rows", got=held_out, remedy="Give held-out rows with --gate-data."
        )


def _same_rows(source: str) -> str:
    """One name for every way of writing a source; counts of the bundled task's rows are left out."""
    if source.startswith(f"{TASK}:"):
        return ":".join(source.split(":")[:2])
    return str(Path(source).resolve()) if Path(source).exists() else source
