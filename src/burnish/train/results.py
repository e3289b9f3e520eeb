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
        overflow: it was because of the scale of a float16 loss, which is smaller from now on.
        tokens_per_s: tokens over seconds, where nothing else is given.
        phases, memory, flops_per_s, peak_share: as in `profile.StepProfile`.
    """

    step: int
    loss: float
    tokens: int
    label_tokens: int
    seconds: float
    learning_rate: float
    grad_norm: float
    skipped: bool = False
    overflow: bool = False
    tokens_per_s: float | None = None
    phases: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    flops_per_s: float | None = None
    peak_share: float | None = None

    def __post_init__(self) -> None:
        if self.tokens_per_s is None and self.seconds > 0:
            object.__setattr__(self, "tokens_per_s", self.tokens / self.seconds)

    @property
    def memory_bytes(self) -> int | None:
        """The most that was held at a mark of the step; None where memory was not read."""
        return max((sum(parts.values()) for parts in self.memory.values()), default=None)

    def figures(self) -> dict[str, float]:
        """What a tracker is sent: plain names, numbers only."""
        named = {
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "tokens_per_s": self.tokens_per_s,
            "memory_bytes": self.memory_bytes,
            "flops_per_s": self.flops_per_s,
            "peak_share": self.peak_share,
        }
        return {name: float(value) for name, value in named.items() if value is not None}


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
        steps, eval: of the whole run, also what a checkpoint brought along; so are `seconds` and `skipped_steps`.
        stopped: "finished", "max_seconds", "early_stopping" or "interrupted".
        tokens_per_s: real tokens per second over the steady state (the first `STEADY_AFTER` steps left out).
        seconds: wall time of the whole run, evaluations included.
        component_bytes: weights, gradients, optimizer, activations (see `train`), in bytes.
        precision: what the run computed in.
        skipped_steps: steps whose loss or gradient was not finite.
        padding_share: share of the computed positions that were padding, since the last start.
        resumed_from: step of the checkpoint that the run went on from; None for one that began anew.
        best_step: step of the lowest evaluation loss.
        best_kept: the model holds the weights of that step, not of the last.
        phase_seconds: wall time by phase since the last start (`profile.PHASES`).
        highest_memory: bytes by component at the mark that held most (`profile.COMPONENTS`).
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
    resumed_from: int | None = None
    best_step: int | None = None
    best_kept: bool = False
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    highest_memory: Mapping[str, int] = field(default_factory=dict)

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
