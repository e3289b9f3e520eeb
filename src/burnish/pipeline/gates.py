"""Gates: a child model is compared with its parent on held-out text, and refused when it is worse than the limits allow."""

from __future__ import annotations

from dataclasses import dataclass

from burnish.errors import GateError
from burnish.measure.compare import Comparison


@dataclass(frozen=True, kw_only=True)
class GateLimits:
    """What a child may lose.

    Attributes:
        max_kl: mean KL(parent || child) in nats per learned token.
        min_agreement: share of positions where both choose the same token, 0..1.
    """

    max_kl: float
    min_agreement: float


MERGE_LIMITS = GateLimits(max_kl=1e-3, min_agreement=0.995)
# What a quantization may cost by the number of bits: at 8 next to nothing; below, what a sound 4-bit model loses.
QUANTIZE_LIMITS = {
    8: GateLimits(max_kl=0.01, min_agreement=0.98),
    4: GateLimits(max_kl=0.10, min_agreement=0.93),
    3: GateLimits(max_kl=0.25, min_agreement=0.88),
    2: GateLimits(max_kl=0.50, min_agreement=0.80),
}


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """A verdict with what it rests on."""

    verdict: str
    kl_mean: float
    kl_p99: float
    greedy_agreement: float
    perplexity_child: float
    perplexity_parent: float
    num_tokens: int
    limits: GateLimits
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.verdict == "pass"


def judge(comparison: Comparison, limits: GateLimits) -> GateResult:
    """Hold a comparison against limits; a comparison that is not a number fails."""
    reasons = []
    if not comparison.kl_mean <= limits.max_kl:
        reasons.append(f"mean KL {comparison.kl_mean:.4g} nats/token is over {limits.max_kl:g}")
    if not comparison.greedy_agreement >= limits.min_agreement:
        reasons.append(f"greedy agreement {comparison.greedy_agreement:.2%} is under {limits.min_agreement:.2%}")
    return GateResult(
        verdict="fail" if reasons else "pass",
        kl_mean=comparison.kl_mean,
        kl_p99=comparison.kl_p99,
        greedy_agreement=comparison.greedy_agreement,
        perplexity_child=comparison.perplexity_child,
        perplexity_parent=comparison.perplexity_parent,
        num_tokens=comparison.num_tokens,
        limits=limits,
        reasons=tuple(reasons),
    )


def gate_error(what: str, result: GateResult, *, remedy: str) -> GateError:
    """The error for a child that failed, for the caller to raise once the child's manifest says so."""
    return GateError(f"{what} is worse than its parent: {'; '.join(result.reasons)}", remedy=remedy)
