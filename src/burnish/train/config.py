"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from burnish.errors import ConfigError
from burnish.train.batches import ORDERINGS, Ordering
from burnish.train.schedule import SCHEDULES, ScheduleName

PRECISIONS = ("auto", "float32", "bfloat16")
METHODS = ("lora", "full")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run.

    Attributes:
        method: "lora" trains the adapters that the model carries; "full" trains every weight.
        steps: optimizer steps. Give this or `epochs`; with neither, one epoch.
        epochs: passes over the data, fractions allowed.
        micro_batch_size: rows per forward pass.
        gradient_accumulation: micro-batches per optimizer step.
        learning_rate: peak rate.
        schedule: "linear" or "cosine" towards zero, or "constant".
        warmup: share of all steps (below 1) or a number of steps with a rising rate.
        weight_decay: AdamW's, on matrices only.
        betas, epsilon: AdamW's.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        precision: "float32", "bfloat16" or "auto" (see `precision.resolve_precision`).
        gradient_checkpointing: keep block inputs only and compute blocks again in the backward pass.
        ordering: "grouped" by length (least padding), "shuffled", or "given".
        eval_every: evaluate every so many steps; 0 only at the end.
        max_seconds: stop after the step during which this time is reached.
        max_bad_steps: stop after so many steps in a row whose loss or gradient is not finite.
        seed: order of rows and dropout.
    """

    method: Literal["lora", "full"] = "lora"
    steps: int | None = None
    epochs: float | None = None
    micro_batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 2e-4
    schedule: ScheduleName = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    ordering: Ordering = "grouped"
    eval_every: int = 0
    max_seconds: float | None = None
    max_bad_steps: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("method", self.method, METHODS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
            ("ordering", self.ordering, ORDERINGS),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} is not known", got=repr(value), expected=", ".join(allowed))
        for name, value in (
            ("micro_batch_size", self.micro_batch_size),
            ("gradient_accumulation", self.gradient_accumulation),
            ("max_bad_steps", self.max_bad_steps),
        ):
            if value < 1:
                raise ConfigError(f"{name} is out of range", got=value, expected="at least 1")
        for name, value in (
            ("steps", self.steps),
            ("epochs", self.epochs),
            ("learning_rate", self.learning_rate),
            ("max_grad_norm", self.max_grad_norm),
            ("max_seconds", self.max_seconds),
        ):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is out of range", got=value, expected="more than 0")
        for name, value in (
            ("warmup", self.warmup),
            ("weight_decay", self.weight_decay),
            ("eval_every", self.eval_every),
        ):
            if value < 0:
                raise ConfigError(f"{name} is out of range", got=value, expected="0 or more")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("both steps and epochs are given", remedy="Give one of them.")

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation
