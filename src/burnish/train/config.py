"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from burnish.errors import ConfigError
from burnish.plan.training import TOKENS_AT_ONCE
from burnish.train.row_order import ORDERINGS, Ordering
from burnish.train.schedule import SCHEDULES, ScheduleName

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
METHODS = ("lora", "qlora-4bit", "qlora-8bit", "full")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit", "adafactor", "lion")
SHARDINGS = ("none", "zero1", "zero2", "zero3")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run.

    Attributes:
        method: "lora" trains the adapters that the model carries, "qlora-4bit" and "qlora-8bit" those over frozen
            weights in NF4 or 8 bits; "full" trains every weight.
        freeze: glob patterns ("model.layers.0.*") of parameters that "full" leaves as they are.
        steps: optimizer steps. Give this or `epochs`; with neither, one epoch.
        epochs: passes over the data, fractions allowed.
        micro_batch_size: rows per forward pass.
        micro_batch_tokens: tokens per forward pass at most (a longer row goes alone); None: see `tokens_at_once`.
        packing: rows of a forward pass lie end to end instead of being padded to the longest; the losses are the same.
        gradient_accumulation: micro-batches per optimizer step.
        tokens_per_step: instead of a number of rows: as many rows in each step as fit into so many tokens, without
            splitting any (see `packing_plan.pack_rows`).
        learning_rate: peak rate.
        schedule: "linear", "cosine", "wsd", "inverse-sqrt" or "constant" (see `schedule.rate_factor`).
        min_rate: share of the peak rate that the schedule ends at, 0 up to 1.
        warmup: share of all steps (below 1) or a number of steps with a rising rate.
        optimizer: "adamw", "adamw-8bit", "paged-adamw-8bit", "adafactor" or "lion" (see `optimizers.make_optimizer`).
        offload_activations: what the backward pass needs waits in host memory; CUDA only.
        offload_optimizer: keep the optimizer's state in host memory and update there; CUDA only.
        weight_decay: decoupled, on matrices only.
        betas, epsilon: the optimizer's; its usual ones when None.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        precision: "float32", "bfloat16", "float16" with loss scaling, or "auto" (see `precision.resolve_precision`).
        gradient_checkpointing: keep block inputs only and compute blocks again in the backward pass.
        checkpoint_every: with `gradient_checkpointing`, do so with every so many-th block; 1 is every block.
        ordering: "grouped" by length (least padding), "shuffled", or "given".
        eval_every: evaluate every so many steps; 0 only at the end.
        eval_first: evaluate before the first step too; what `keep_best` gives back may then be what was begun with.
        max_seconds: stop after the step during which this time is reached.
        max_bad_steps: stop after so many steps in a row whose loss or gradient is not finite.
        save_every: write a checkpoint every so many steps; 0 only when the run is interrupted.
        keep_last: checkpoints that are kept.
        keep_best: keep the checkpoint with the lowest evaluation loss too, and give its weights back at the end.
        early_stopping_patience: stop after so many evaluations in a row without a gain; None never does.
        early_stopping_min_delta: least fall of the evaluation loss that counts as a gain, in nats.
        neftune: scale of the noise on embeddings while training (see `neftune.EmbeddingNoise`); 0 for none.
        sharding: what several processes divide among them: "none" (each holds everything), "zero1" the optimizer's
            state, "zero2" gradients too, "zero3" weights too (see `distributed.py`).
        seed: order of rows and dropout.
    """

    method: Literal["lora", "qlora-4bit", "qlora-8bit", "full"] = "lora"
    freeze: tuple[str, ...] = ()
    steps: int | None = None
    epochs: float | None = None
    micro_batch_size: int = 8
    micro_batch_tokens: int | None = None
    packing: bool = True
    gradient_accumulation: int = 1
    tokens_per_step: int | None = None
    learning_rate: float = 2e-4
    schedule: ScheduleName = "cosine"
    min_rate: float = 0.0
    warmup: float = 0.03
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "adafactor", "lion"] = "adamw"
    offload_activations: bool = False
    offload_optimizer: bool = False
    weight_decay: float = 0.0
    betas: tuple[float, float] | None = None
    epsilon: float | None = None
    max_grad_norm: float | None = 1.0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 1
    ordering: Ordering = "grouped"
    eval_every: int = 0
    eval_first: bool = False
    max_seconds: float | None = None
    max_bad_steps: int = 5
    save_every: int = 0
    keep_last: int = 2
    keep_best: bool = False
    early_stopping_patience: int | None = None
    early_stopping_min_delta: float = 0.0
    neftune: float = 0.0
    sharding: Literal["none", "zero1", "zero2", "zero3"] = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("method", self.method, METHODS),
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("sharding", self.sharding, SHARDINGS),
            ("precision", self.precision, PRECISIONS),
            ("ordering", self.ordering, ORDERINGS),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} is not known", got=repr(value), expected=", ".join(allowed))
        for name, value in (
            ("micro_batch_size", self.micro_batch_size),
            ("gradient_accumulation", self.gradient_accumulation),
            ("micro_batch_tokens", self.micro_batch_tokens),
            ("checkpoint_every", self.checkpoint_every),
            ("max_bad_steps", self.max_bad_steps),
            ("keep_last", self.keep_last),
            ("early_stopping_patience", self.early_stopping_patience),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is out of range", got=value, expected="at least 1")
        for name, value in (
            ("steps", self.steps),
            ("epochs", self.epochs),
            ("learning_rate", self.learning_rate),
            ("max_grad_norm", self.max_grad_norm),
            ("max_seconds", self.max_seconds),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is out of range", got=value, expected="more than 0, and finite")
        for name, value in (
            ("warmup", self.warmup),
            ("weight_decay", self.weight_decay),
            ("eval_every", self.eval_every),
            ("save_every", self.save_every),
            ("early_stopping_min_delta", self.early_stopping_min_delta),
            ("neftune", self.neftune),
        ):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name} is out of range", got=value, expected="0 or more, and finite")
        if self.freeze and self.method != "full":
            raise ConfigError(
                "freeze is for full fine-tuning",
                got=self.method,
                remedy="Choose what an adapter is put on by its targets.",
            )
        if self.tokens_per_step is not None:
            if self.tokens_per_step < 1:
                raise ConfigError("tokens_per_step is out of range", got=self.tokens_per_step, expected="at least 1")
            if self.gradient_accumulation != 1:
                raise ConfigError(
                    "both tokens_per_step and gradient_accumulation are given",
                    remedy="Give one of them: a step has as many micro-batches as its rows need.",
                )
        if self.micro_batch_tokens is not None and not self.packing:
            raise ConfigError("micro_batch_tokens needs packing", remedy="Leave one of the two options out.")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError("both steps and epochs are given", remedy="Give one of them.")
        for name, wanted in (
            ("keep_best", self.keep_best),
            ("early_stopping_patience", self.early_stopping_patience is not None),
        ):
            if wanted and not self.eval_every:
                raise ConfigError(f"{name} needs evaluations during the run", remedy="Give eval_every.")
        if self.early_stopping_min_delta and self.early_stopping_patience is None:
            raise ConfigError("early_stopping_min_delta needs early_stopping_patience")

        if not 0 <= self.min_rate < 1:
            raise ConfigError("min_rate is out of range", got=self.min_rate, expected="0 up to, not including, 1")
        if self.min_rate and self.schedule == "constant":
            raise ConfigError("a constant schedule has no min_rate", remedy="Leave it out, or use another schedule.")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("betas are out of range", got=self.betas, expected="0 up to, not including, 1")
        if self.betas is not None and self.optimizer == "adafactor":
            raise ConfigError("adafactor has no betas", remedy="Leave them out, or use another optimizer.")
        if self.epsilon is not None and self.optimizer == "lion":
            raise ConfigError("lion has no epsilon", remedy="Leave it out, or use another optimizer.")
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            raise ConfigError("epsilon is out of range", got=self.epsilon, expected="more than 0, and finite")

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation

    def tokens_at_once(self, device: str) -> int | None:
        """Most positions of a packed micro-batch on a kind of device ("cpu", "cuda"); None without packing."""
        if not self.packing:
            return None
        return self.micro_batch_tokens or TOKENS_AT_ONCE.get(device, TOKENS_AT_ONCE["cuda"])
