"""Which base an adapter goes onto that was trained over quantized weights: the original one, or the dequantized one.

The adapter learned to make up for the rounding of the weights it saw, and the original weights have no rounding to make
up for: neither is always better, so both are held against rows that nobody trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from burnish.measure.compare import Comparison

ONTO = ("auto", "original", "dequantized")
SAME_LOSS = 1e-3  # nats per token: below, the distance from the unmerged adapter decides


@dataclass(frozen=True, kw_only=True)
class MergeTrial:
    """One merged model on the held-out rows, in nats per learned token.

    Attributes:
        onto: "original" or "dequantized".
        loss: its own; `loss_unmerged` is that of the quantized base with the adapter.
        kl_mean, greedy_agreement: from the quantized base with the adapter.
    """

    onto: str
    loss: float
    loss_unmerged: float
    kl_mean: float
    greedy_agreement: float


def trial_of(onto: str, comparison: Comparison) -> MergeTrial:
    """The figures of one comparison with the unmerged adapter."""
    return MergeTrial(
        onto=onto,
        loss=math.log(comparison.perplexity_child),
        loss_unmerged=math.log(comparison.perplexity_parent),
        kl_mean=comparison.kl_mean,
        greedy_agreement=comparison.greedy_agreement,
    )


def better(trials: Sequence[MergeTrial]) -> tuple[str, str]:
    """The base to keep and why: the lower loss; of equal ones that which is closer to the unmerged adapter."""
    ranked = sorted(trials, key=lambda trial: _known(trial.loss))
    best, other = ranked[0], ranked[1]
    rule = "lower held-out loss"
    if _known(other.loss) - _known(best.loss) < SAME_LOSS:
        best, other = sorted(trials, key=lambda trial: _known(trial.kl_mean))
        rule = "equal held-out loss, closer to the unmerged adapter"
    return best.onto, (
        f"{rule}: {best.loss:.4f} nats per token on the {best.onto} weights, "
        f"{other.loss:.4f} on the {other.onto} ones, {best.loss_unmerged:.4f} unmerged; "
        f"KL from that {best.kl_mean:.2g} and {other.kl_mean:.2g}"
    )


def _known(value: float) -> float:
    return math.inf if math.isnan(value) else value
