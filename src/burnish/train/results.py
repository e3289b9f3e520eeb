"""What a training run reports."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

STEADY_AFTER = 2  # steps left out of the throughput: allocators and caches are still warming up


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        loss: mean per learned token, in nats, before the update.
        tokens: real tokens read, without padding.
        label_tokens: tokens learned.
        seconds: wall time of the step.
        learning_rate: rate of the update.
        grad_norm: norm of all gradients before clipping.
        skipped: loss or gradient was not finite, so nothing was updated.
    """

    step: int
    loss: float
    tokens: int
    label_tokens: int
    seconds: float
    learning_rate: float
    grad_norm: float
    skipped: bool = False


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One evaluation: `loss` is the mean per learned token over all evaluation rows; `figures` come from the caller."""

    step: int
    loss: float | None
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished or stopped run.

    Attributes:
        stopped: "finished", "max_seconds" or "interrupted".
        tokens_per_s: real tokens per second over the steady state (the first `STEADY_AFTER` steps left out).
        seconds: wall time of the whole run, evaluations included.
        component_bytes: weights, gradients, optimizer, activations (see `train`), in bytes.
        precision: what the run computed in.
        skipped_steps: steps whose loss or gradient was not finite.
        padding_share: share of the computed positions that were padding.
    """

    steps: list[StepRecord]
    eval: list[EvalRecord]
    stopped: str
    tokens_per_s: float
    seconds: float
    component_bytes: dict[str, int]
    precision: str
    skipped_steps: int
    padding_share: float

    @property
    def interrupted(self) -> bool:
        """Ctrl-C ended the run early; what was learned until then is in the model."""
        return self.stopped == "interrupted"


def steady_tokens_per_s(steps: Sequence[StepRecord]) -> float:
    """Real tokens per second without the warm-up; over all steps when there are too few to leave some out."""
    steady = steps[STEADY_AFTER:] or steps
    seconds = sum(step.seconds for step in steady)
    return sum(step.tokens for step in steady) / seconds if seconds else 0.0


def recent_loss(steps: Sequence[StepRecord], *, window: int = 20) -> float:
    """Mean loss of the last `window` steps that counted, for a progress line."""
    losses = [step.loss for step in steps[-window:] if not step.skipped]
    return statistics.fmean(losses) if losses else float("nan")
