"""Gates: the default limits of each stage, and the record of a child that was held against its parent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from burnish.errors import GateError
from burnish.measure.compare import Comparison, Gate, GateLimits

MERGE_LIMITS = GateLimits(max_kl_mean=1e-3, min_greedy_agreement=0.995)
# What a quantization may cost by its bits: at 8 next to nothing; below, what a sound model of that width loses.
QUANTIZE_LIMITS = {
    8: GateLimits(max_kl_mean=0.01, min_greedy_agreement=0.98),
    4: GateLimits(max_kl_mean=0.10, min_greedy_agreement=0.93),
    3: GateLimits(max_kl_mean=0.25, min_greedy_agreement=0.88),
    2: GateLimits(max_kl_mean=0.50, min_greedy_agreement=0.80),
}
# On the bundled task a mean KL of 0.02 costs 5 points of accuracy and 0.09 costs 16: past these a child has to recover.
PRUNE_LIMITS = {
    "magnitude": GateLimits(max_kl_mean=0.05, min_greedy_agreement=0.95),
    "wanda": GateLimits(max_kl_mean=0.05, min_greedy_agreement=0.95),
    "sparsegpt": GateLimits(max_kl_mean=0.05, min_greedy_agreement=0.95),
    "structured": GateLimits(max_kl_mean=0.10, min_greedy_agreement=0.93),
    # Training moves a child away from its parent for the better too, which its perplexity tells.
    "recovered": GateLimits(max_kl_mean=0.15, min_greedy_agreement=0.93, max_perplexity_ratio=1.02),
}


class NamedError(Protocol):
    """A layer of the model and what it lost."""

    @property
    def name(self) -> str: ...

    @property
    def error(self) -> float: ...


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

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"


def judge(comparison: Comparison, limits: GateLimits, *, layers: Sequence[NamedError] = ()) -> GateResult:
    """Hold a comparison against limits; the worst of `layers` are named when the child fails."""
    verdict = Gate(limits).judge(comparison, worst_layers=[(layer.name, layer.error) for layer in layers])
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
    )


def gate_error(what: str, result: GateResult, *, remedy: str) -> GateError:
    """The error for a child that failed, for the caller to raise once the child's manifest says so."""
    reasons = "; ".join(result.reasons)
    return GateError(f"{what} is worse than its parent and is marked as failed: {reasons}", remedy=remedy)
