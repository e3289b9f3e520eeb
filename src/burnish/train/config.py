"""The settings of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from burnish.errors import SettingError
from burnish.plan.training import TOKENS_AT_ONCE
from burnish.train.row_order import ORDERINGS, Ordering
from burnish.train.schedule import SCHEDULES, ScheduleName

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
METHODS = ("lora", "qlora-4bit", "qlora-8bit", "full")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit", "adafactor", "lion")
SHARDINGS = ("none", "zero1", "zero2", "zero3")
_COUNTS = ("micro_batch_size", "gradient_accumulation", "micro_batch_tokens", "tokens_per_step", "checkpoint_every",
           "max_bad_steps", "keep_last", "early_stopping_patience")  # fmt: skip
_ABOVE_ZERO = ("steps", "epochs", "learning_rate", "max_grad_norm", "max_seconds", "epsilon")
_FROM_ZERO = ("warmup", "weight_decay", "eval_every", "save_every", "early_stopping_min_delta", "neftune")


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
        problems = [*self._unknown(), *self._out_of_range(), *self._conflicts()]
        if problems:
            raise SettingError.of(problems)

    def _unknown(self) -> Iterator[SettingError]:
        for name, value, allowed in (
            ("method", self.method, METHODS),
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("sharding", self.sharding, SHARDINGS),
            ("precision", self.precision, PRECISIONS),
            ("ordering", self.ordering, ORDERINGS),
        ):
            if value not in allowed:
                yield SettingError(f"{{{name}}} is not known", got=repr(value), expected=", ".join(allowed))

    def _out_of_range(self) -> Iterator[SettingError]:
        for names, holds, expected in (
            (_COUNTS, lambda value: value >= 1, "at least 1"),
            (_ABOVE_ZERO, lambda value: 0 < value < math.inf, "more than 0, and finite"),
            (_FROM_ZERO, lambda value: 0 <= value < math.inf, "0 or more, and finite"),
            (("min_rate",), lambda value: 0 <= value < 1, "0 up to, not including, 1"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    yield SettingError(f"{{{name}}} is out of range", got=value, expected=expected)
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            yield SettingError("{betas} are out of range", got=self.betas, expected="0 up to, not including, 1")

    def _conflicts(self) -> Iterator[SettingError]:
        leave_out = "Leave one of them out."
        if self.freeze and self.method != "full":
            yield SettingError(
                "{freeze} is for full fine-tuning",
                got=self.method,
                remedy="Choose what an adapter is put on by its targets.",
            )
        if self.tokens_per_step is not None and self.gradient_accumulation != 1:
            yield SettingError(
                "both {tokens_per_step} and {gradient_accumulation} are given",
                remedy="Give one of them: a step has as many micro-batches as its rows need.",
            )
        if self.micro_batch_tokens is not None and not self.packing:
            yield SettingError("{micro_batch_tokens} needs {packing}", remedy=leave_out)
        if self.steps is not None and self.epochs is not None:
            yield SettingError("both {steps} and {epochs} are given", remedy="Give one of them.")
        wanted = {"keep_best": self.keep_best, "early_stopping_patience": self.early_stopping_patience is not None}
        if any(wanted.values()) and not self.eval_every:
            names = [f"{{{name}}}" for name, is_wanted in wanted.items() if is_wanted]
            verb = "needs" if len(names) == 1 else "need"
            yield SettingError(f"{' and '.join(names)} {verb} evaluations during the run", remedy="Give {eval_every}.")
        if self.early_stopping_min_delta and self.early_stopping_patience is None:
            yield SettingError("{early_stopping_min_delta} needs {early_stopping_patience}", remedy="Give both.")
        if self.min_rate and self.schedule == "constant":
            yield SettingError("a constant {schedule} has no {min_rate}", remedy=leave_out)
        if self.betas is not None and self.optimizer == "adafactor":
            yield SettingError("adafactor has no {betas}", remedy="Leave them out, or use another {optimizer}.")
        if self.epsilon is not None and self.optimizer == "lion":
            yield SettingError("lion has no {epsilon}", remedy="Leave it out, or use another {optimizer}.")

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation

    def tokens_at_once(self, device: str) -> int | None:
        """Most positions of a packed micro-batch on a kind of device ("cpu", "cuda"); None without packing."""
        if not self.packing:
            return None
        return self.micro_batch_tokens or TOKENS_AT_ONCE.get(device, TOKENS_AT_ONCE["cuda"])
