"""The run record: what `run.json` in a run's folder holds, as frozen values. Torch-free.

The pipeline fills it stage by stage and writes `RunRecord.to_dict()`; the report reads it back with `from_dict`.
Every figure may be None: a run that stopped early, or that left a stage out, is still reported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from burnish.errors import DataError
from burnish.measure.json_values import to_plain

SCHEMA = 1
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=True)


@dataclass(frozen=True, kw_only=True)
class DtypeShare:
    """Elements that a variant holds in one dtype (`memory.DtypeRow` as JSON)."""

    __pydantic_config__ = _STRICT

    dtype: str
    elements: int
    bytes: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model of the run: the base, or something made from it."""

    __pydantic_config__ = _STRICT

    name: str
    parent: str | None = None
    """The variant that the KL and the agreement refer to."""
    description: str = ""
    path: str = ""
    dtype: str | None = None
    disk_bytes: int | None = None
    weights_bytes: int | None = None
    kv_bytes: int | None = None
    peak_memory_bytes: int | None = None
    """What the process grew by at its worst moment, from before loading to the last answer (CUDA: allocated)."""
    ttft_ms: float | None = None
    """Median at a concurrency of 1."""
    tpot_ms: float | None = None
    output_tokens_per_s_1: float | None = None
    output_tokens_per_s_8: float | None = None
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    num_rows: int | None = None
    perplexity: float | None = None
    kl_to_parent: float | None = None
    kl_p99: float | None = None
    greedy_agreement: float | None = None
    verdict: str | None = None
    """`pass`, `fail`, or None for a variant that no gate judged."""
    reasons: list[str] = field(default_factory=list)
    dtypes: list[DtypeShare] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the run. Both peaks count the same thing: what the stage holds at its worst moment."""

    __pydantic_config__ = _STRICT

    name: str
    seconds: float | None = None
    predicted_seconds: float | None = None
    predicted_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    components: dict[str, int] = field(default_factory=dict)
    """weights, gradients, optimizer, activations, kv, other: bytes."""
    predicted_components: dict[str, int] = field(default_factory=dict)
    """The same, as the plan has them."""
    status: str = "done"
    """`done`, `failed` or `skipped`."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """The training loss (nats per learned token) after an optimizer step."""

    __pydantic_config__ = _STRICT

    step: int
    loss: float
    tokens: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingPoint:
    """The profile of an optimizer step, or of several steps that end with it (long runs are thinned)."""

    __pydantic_config__ = _STRICT

    step: int
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    """data, forward, backward, optimizer, evaluation, saving, other: seconds."""
    memory: dict[str, int] = field(default_factory=dict)
    """weights, gradients, optimizer, activations, other: bytes after the largest forward pass."""


@dataclass(frozen=True, kw_only=True)
class SampleAnswer:
    """What one variant answered."""

    __pydantic_config__ = _STRICT

    text: str
    right: bool | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out question, the expected answer and every variant's."""

    __pydantic_config__ = _STRICT

    question: str
    gold: str
    context: str = ""
    answers: dict[str, SampleAnswer] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A whole run. `settings` holds the resolved configuration, one mapping per stage."""

    __pydantic_config__ = _STRICT

    name: str
    created: str
    """When the run began, ISO 8601."""
    schema: int = SCHEMA
    model: str = ""
    parameters: int | None = None
    task: str = ""
    data: str = ""
    metric: str = "execution accuracy"
    seconds: float | None = None
    hardware: dict[str, Any] = field(default_factory=dict)
    """As `hardware.hardware_record()`: cpu, cores, memory_bytes, instruction_sets, os; `threads`, `device` beside."""
    versions: dict[str, str] = field(default_factory=dict)
    variants: list[Variant] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    loss: list[LossPoint] = field(default_factory=list)
    eval_loss: list[LossPoint] = field(default_factory=list)
    training: list[TrainingPoint] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def variant(self, name: str) -> Variant | None:
        """The variant of that name, if the run has it."""
        return next((variant for variant in self.variants if variant.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values; NaN and infinities become null, which JSON has no word for."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any], *, source: str = "the run record") -> RunRecord:
        """Read a record, strictly.

        Raises:
            DataError: a key is unknown, missing or of the wrong type; the message names it and `source`.
        """
        if isinstance(record, dict) and record.get("schema", SCHEMA) != SCHEMA:
            raise DataError(
                f"{source} was written by another version of burnish",
                got=f"schema {record['schema']}",
                expected=f"schema {SCHEMA}",
            )
        try:
            return _adapter().validate_python(record)
        except ValidationError as error:
            raise _as_data_error(error, source) from error


@lru_cache(maxsize=1)
def _adapter() -> TypeAdapter[RunRecord]:
    return TypeAdapter(RunRecord)


def read_run(path: str | Path) -> RunRecord:
    """Read a run's folder or its `run.json`.

    Raises:
        DataError: there is none, it is not JSON, or it is not a run record.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "run.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"there is no run at {path}", remedy="See the runs there are with: burnish runs ls") from error
    except (OSError, UnicodeError) as error:
        raise DataError(f"{file} cannot be read", got=error) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not JSON", got=error) from error
    return RunRecord.from_dict(record, source=str(file))


def _as_data_error(error: ValidationError, source: str) -> DataError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "its top"
    if first["type"] == "unexpected_keyword_argument":
        key = str(first["loc"][-1])
        close = get_close_matches(key, _known_keys(), n=1)
        return DataError(f"{source} has an unknown key {place}", remedy=f"Did you mean {close[0]}?" if close else None)
    if first["type"] in ("missing", "missing_keyword_only_argument"):
        return DataError(f"{source} has no {place}")
    return DataError(f"{source} has a wrong value at {place}", got=repr(first["input"])[:80], expected=first["msg"])


def _known_keys() -> list[str]:
    kinds = (RunRecord, Variant, Stage, LossPoint, TrainingPoint, Sample, SampleAnswer, DtypeShare)
    return sorted({item.name for kind in kinds for item in fields(kind)})
