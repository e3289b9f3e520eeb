"""Gates: the default limits of each stage, and the record of a child that was held against its parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from burnish.errors import ConfigError, GateError
from burnish.measure.compare import Comparison, Gate, GateLimits
from burnish.measure.paired import TaskComparison

MERGE_LIMITS = GateLimits(max_kl_mean=1e-3, max_kl_p99=0.02, min_greedy_agreement=0.995, max_score_drop=0.005)
# What a quantization may cost by its bits: at 8 next to nothing; below, what a sound model of that width loses.
QUANTIZE_LIMITS = {
    8: GateLimits(max_kl_mean=0.01, max_kl_p99=0.2, min_greedy_agreement=0.98, max_score_drop=0.01),
    4: GateLimits(max_kl_mean=0.10, max_kl_p99=2.0, min_greedy_agreement=0.93, max_score_drop=0.03),
    3: GateLimits(max_kl_mean=0.25, max_kl_p99=4.0, min_greedy_agreement=0.88, max_score_drop=0.06),
    2: GateLimits(max_kl_mean=0.50, max_kl_p99=6.0, min_greedy_agreement=0.80, max_score_drop=0.10),
}
_ZEROS = GateLimits(max_kl_mean=0.05, max_kl_p99=1.0, min_greedy_agreement=0.95, max_score_drop=0.03)
# On the bundled task a mean KL of 0.02 costs 5 points of accuracy and 0.09 costs 16: past these a child has to recover.
PRUNE_LIMITS = {
    "magnitude": _ZEROS,
    "wanda": _ZEROS,
    "sparsegpt": _ZEROS,
    "structured": GateLimits(max_kl_mean=0.10, max_kl_p99=2.0, min_greedy_agreement=0.93, max_score_drop=0.05),
    # Training moves a child away from its parent for the better too, which its perplexity tells.
    "recovered": GateLimits(
        max_kl_mean=0.15, max_kl_p99=4.0, min_greedy_agreement=0.93, max_perplexity_ratio=1.02, max_score_drop=0.03
    ),
}
GATE_ROWS = 100


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """What a gate is to measure, and limits in the place of a stage's own.

    Attributes:
        rows: held-out questions that child and parent answer; 0 leaves the task out.
        max_kl, max_kl_p99: nats per token.
        min_agreement: share of equal greedy tokens.
        max_perplexity_ratio: child's over parent's.
        max_score_drop: parent's task score less child's, a share; a larger drop counts when it is not chance.
    """

    rows: int = GATE_ROWS
    max_kl: float | None = None
    max_kl_p99: float | None = None
    min_agreement: float | None = None
    max_perplexity_ratio: float | None = None
    max_score_drop: float | None = None

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise ConfigError("gate-rows is out of range", got=self.rows, expected="0 or more")
        if self.rows == 0 and self.max_score_drop is not None:
            raise ConfigError("max-score-drop needs answers", remedy="Give --gate-rows of 1 or more.")
        self.applied(GateLimits())

    @property
    def any_limit(self) -> bool:
        """Whether a limit was given."""
        return any(value is not None for value in self._given().values())

    def applied(self, limits: GateLimits) -> GateLimits:
        """These limits where they are given, else those; the limit on the 99th percentile moves with that on the mean.

        Raises:
            ConfigError: one is out of range.
        """
        given = {name: value for name, value in self._given().items() if value is not None}
        if self.max_kl is not None and self.max_kl_p99 is None and limits.max_kl_mean and limits.max_kl_p99 is not None:
            given["max_kl_p99"] = self.max_kl * limits.max_kl_p99 / limits.max_kl_mean
        return replace(limits, **given)

    def _given(self) -> dict[str, float | None]:
        return {
            "max_kl_mean": self.max_kl,
            "max_kl_p99": self.max_kl_p99,
            "min_greedy_agreement": self.min_agreement,
            "max_perplexity_ratio": self.max_perplexity_ratio,
            "max_score_drop": self.max_score_drop,
        }


class NamedError(Protocol):
    """A layer of the model and what it lost."""

    @property
    def name(self) -> str: ...

    @property
    def error(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class RecordedError:
    """The same, as a manifest holds it."""

    name: str
    error: float


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """A verdict ("pass" or "fail") with the figures it rests on; KL in nats per learned token."""

    verdict: str
    reasons: tuple[str, ...]
    kl_mean: float
    kl_p99: float
    greedy_agreement: float
    perplexity_child: float
    perplexity_parent: float
    num_tokens: int
    limits: GateLimits
    task: TaskComparison | None = None
    """None where nothing was asked: the rows bring no SQL, or the gate was told to ask none."""

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"


def judge(
    comparison: Comparison,
    limits: GateLimits,
    *,
    layers: Sequence[NamedError] = (),
    task: TaskComparison | None = None,
) -> GateResult:
    """Hold a comparison, and the answers to a task, against limits; the worst `layers` are named if the child fails."""
    judged = limits if task is not None else replace(limits, max_score_drop=None, min_score=None)
    verdict = Gate(judged).judge(comparison, task=task, worst_layers=[(layer.name, layer.error) for layer in layers])
    return GateResult(
        verdict=verdict.verdict,
        reasons=verdict.reasons,
        kl_mean=comparison.kl_mean,
        kl_p99=comparison.kl_p99,
        greedy_agreement=comparison.greedy_agreement,
        perplexity_child=comparison.perplexity_child,
        perplexity_parent=comparison.perplexity_parent,
        num_tokens=comparison.num_tokens,
        limits=limits,
        task=task,
    )


def quantize_limits(bits: float) -> GateLimits:
    """The default limits of the widest width that is at most `bits`."""
    return QUANTIZE_LIMITS[max((width for width in QUANTIZE_LIMITS if width <= bits), default=2)]


def limits_of_child(manifest: Mapping[str, Any] | None, hf_config: Mapping[str, Any]) -> GateLimits | None:
    """The limits that a child was made under, or those of its bits; None for a model that says neither.

    Raises:
        ConfigError: the manifest's limits are of another kind.
    """
    made = (manifest or {}).get("gate")
    if isinstance(made, Mapping) and isinstance(made.get("limits"), Mapping):
        try:
            return GateLimits(**made["limits"])
        except TypeError as error:
            raise ConfigError("the limits in the model's manifest cannot be read", got=dict(made["limits"])) from error
    bits = _bits_of(hf_config.get("quantization_config"))
    return None if bits is None else quantize_limits(bits)


def _bits_of(quantized: object) -> int | None:
    """The fewest bits of a weight by config.json, in GPTQ's, AWQ's, bitsandbytes' or compressed-tensors' way."""
    if not isinstance(quantized, Mapping):
        return None
    if quantized.get("load_in_4bit") or quantized.get("load_in_8bit"):
        return 4 if quantized.get("load_in_4bit") else 8
    groups = quantized.get("config_groups")
    groups = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in groups if isinstance(group, Mapping)]
    found = [quantized.get("bits"), *(each.get("num_bits") for each in weights if isinstance(each, Mapping))]
    return min((bits for bits in found if isinstance(bits, int)), default=None)


def is_made_from(manifest: Mapping[str, Any] | None, fingerprint: str) -> bool:
    """Whether a child was held against the model of this fingerprint when it was made.

    A merged model's parent is its base with the adapter on it, which the adapter stands for.
    """
    inputs = (manifest or {}).get("inputs") or {}
    merged = (manifest or {}).get("kind") == "merged"
    parents = [each for name, each in inputs.items() if not merged or name.startswith("adapter")]
    return any(isinstance(each, Mapping) and each.get("fingerprint") == fingerprint for each in parents)


def layer_errors(manifest: Mapping[str, Any] | None) -> list[RecordedError]:
    """What each layer lost when the child was made, by its manifest."""
    layers = ((manifest or {}).get("figures") or {}).get("layers") or []
    return [
        RecordedError(name=layer["name"], error=layer["error"]) for layer in layers if layer.get("error") is not None
    ]


def gate_error(what: str, result: GateResult, *, remedy: str, marked: bool = True) -> GateError:
    """The error for a child that failed, for the caller to raise once the child's manifest says so (`marked`)."""
    reasons = "; ".join(result.reasons)
    verdict = "is worse than its parent" + (" and is marked as failed" if marked else "")
    return GateError(f"{what} {verdict}: {reasons}", remedy=remedy)
