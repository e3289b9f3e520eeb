"""The training loop: rows in, an adapted model out, every step on record.

A plain loop over any model with `hidden(tokens_BT)` and `logits(hidden)`. What a run may be told is in `config.py`, how
rows become batches in `batches.py`, what comes out in `results.py`. Reading data and writing files happen elsewhere.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from burnish.errors import BurnishError, ConfigError, DataError
from burnish.models.attention import Attention
from burnish.train.batches import Batch, TrainingExample, collate, count_labels, endless_steps
from burnish.train.config import TrainConfig
from burnish.train.footprint import component_bytes, saved_activations
from burnish.train.lora import lora_parameters
from burnish.train.losses import masked_cross_entropy, used_by_head
from burnish.train.precision import frozen_in_bfloat16, resolve_precision
from burnish.train.results import EvalRecord, StepRecord, TrainResult, steady_tokens_per_s
from burnish.train.schedule import rate_factor, warmup_steps
from burnish.train.short_attention import ShortCausal


class CausalModel(Protocol):
    """What the trainer needs of a model besides being a module, and besides `config.hidden_size` and `.vocab_size`."""

    gradient_checkpointing: bool

    @property
    def dtype(self) -> torch.dtype: ...

    def hidden(self, tokens_BT: Tensor, *, attention: Attention | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class Meter(Protocol):
    """A running memory meter; `peak_bytes` is over everything since `start_bytes` was read."""

    @property
    def start_bytes(self) -> int: ...

    @property
    def peak_bytes(self) -> int: ...


def train(
    model: nn.Module,
    examples: Sequence[TrainingExample],
    *,
    config: TrainConfig,
    eval_examples: Sequence[TrainingExample] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_eval: Callable[[int], Mapping[str, float]] | None = None,
    meter: Meter | None = None,
) -> TrainResult:
    """Train the adapters that `model` carries, or all of it, and report every step.

    The same seed, model, data and number of threads give bit-identical losses. Ctrl-C ends the run between two updates
    and returns what there is, marked as interrupted. `model` is changed in place and left in evaluation mode.

    In precision "bfloat16" an adapter's frozen base is held in bfloat16 while training (evaluations included) and given
    back untouched; full training keeps float32 weights under autocast.

    Args:
        model: a decoder (see `CausalModel`).
        examples: rows; those without a label to learn are refused.
        config: the settings.
        eval_examples: rows for the evaluation loss.
        on_step: called after every step.
        on_eval: called at every evaluation with the step, the model in evaluation mode; returns figures to record.
        meter: a running memory meter. With it, component_bytes["activations"] is its peak over its start less gradients
            and optimizer; without, the bytes that autograd kept in the first step, scaled to the largest micro-batch.

    Raises:
        ConfigError: the method and the model do not fit together, or the precision is not possible.
        DataError: no rows, or a row that teaches nothing.
        BurnishError: the loss or its gradient was not finite for `config.max_bad_steps` steps in a row.
    """
    _check_examples(examples, "training")
    if eval_examples is not None:
        _check_examples(eval_examples, "evaluation")
    run = _Run(model, examples, config)
    try:
        with _seeded(config.seed, run.device), frozen_in_bfloat16(model, enabled=run.precision == "bfloat16"):
            return run.loop(eval_examples=eval_examples, on_step=on_step, on_eval=on_eval, meter=meter)
    finally:
        run.restore()


def evaluate_loss(
    model: nn.Module, examples: Sequence[TrainingExample], *, micro_batch_size: int, precision: str
) -> float:
    """Mean cross-entropy per learned token over all rows, in nats, without dropout; the model's mode is kept."""
    device = next(model.parameters()).device
    by_length = sorted(examples, key=lambda example: len(example.tokens))
    was_training = model.training
    model.eval()
    total, labels = 0.0, 0
    try:
        with torch.no_grad():
            for start in range(0, len(by_length), micro_batch_size):
                batch = collate(by_length[start : start + micro_batch_size], device=device, max_width=_max_width(model))
                total += float(_batch_loss(model, batch, precision=precision, head_parameters=[]))
                labels += batch.num_labels
    finally:
        model.train(was_training)
    return total / labels


class _Run:
    """State of one run: parameters, optimizer, counters."""

    def __init__(self, model: nn.Module, examples: Sequence[TrainingExample], config: TrainConfig) -> None:
        self.model, self.examples, self.config = model, examples, config
        self.parameters = _trainable_parameters(model, config)
        self.precision = resolve_precision(model, config)
        self.device = self.parameters[0].device
        self.total_steps = _total_steps(len(examples), config)
        self.warmup = warmup_steps(config.warmup, self.total_steps)
        self.optimizer = _adamw(self.parameters, config)
        self.head_parameters = _head_parameters(model, self.parameters)
        self.activation_bytes = 0
        self.saved_per_position = 0.0
        self.positions = self.real_positions = self.largest_batch = 0
        self.previous_checkpointing = bool(getattr(model, "gradient_checkpointing", False))
        model.gradient_checkpointing = config.gradient_checkpointing  # type: ignore[assignment]

    def restore(self) -> None:
        self.model.eval()
        self.model.gradient_checkpointing = self.previous_checkpointing  # type: ignore[assignment]
        self.optimizer.zero_grad(set_to_none=True)

    def loop(
        self,
        *,
        eval_examples: Sequence[TrainingExample] | None,
        on_step: Callable[[StepRecord], None] | None,
        on_eval: Callable[[int], Mapping[str, float]] | None,
        meter: Meter | None,
    ) -> TrainResult:
        config = self.config
        lengths = [len(example.tokens) for example in self.examples]
        order = endless_steps(lengths, rows_per_step=config.rows_per_step, ordering=config.ordering, seed=config.seed)
        steps: list[StepRecord] = []
        evals: list[EvalRecord] = []
        bad_in_a_row = 0
        stopped = "finished"
        begin = time.perf_counter()
        self.model.train()
        try:
            for step in range(1, self.total_steps + 1):
                record = self.step(step, [self.examples[row] for row in next(order)])
                steps.append(record)
                bad_in_a_row = bad_in_a_row + 1 if record.skipped else 0
                if bad_in_a_row >= config.max_bad_steps:
                    raise BurnishError(
                        f"training stopped at step {step}: loss or gradient was not finite "
                        f"for {bad_in_a_row} steps in a row",
                        got=f"loss {record.loss}",
                        remedy="Lower the learning rate, or look at the data; these steps did not change the weights.",
                    )
                if on_step is not None:
                    on_step(record)
                out_of_time = config.max_seconds is not None and time.perf_counter() - begin >= config.max_seconds
                last = step == self.total_steps or out_of_time
                due = last or (config.eval_every and step % config.eval_every == 0)
                if due and (eval_examples is not None or on_eval is not None):
                    evals.append(self.evaluate(step, eval_examples, on_eval))
                if out_of_time and step < self.total_steps:
                    stopped = "max_seconds"
                    break
        except KeyboardInterrupt:
            stopped = "interrupted"
        parts = component_bytes(self.model, self.parameters, self.optimizer)
        parts["activations"] = self._activations(parts, meter)
        return TrainResult(
            steps=steps,
            eval=evals,
            stopped=stopped,
            tokens_per_s=steady_tokens_per_s(steps),
            seconds=time.perf_counter() - begin,
            component_bytes=parts,
            precision=self.precision,
            skipped_steps=sum(step.skipped for step in steps),
            padding_share=1 - self.real_positions / self.positions if self.positions else 0.0,
        )

    def step(self, step: int, rows: Sequence[TrainingExample]) -> StepRecord:
        """Forward and backward over the rows' micro-batches, then one update."""
        begin = time.perf_counter()
        size = self.config.micro_batch_size
        batches = [
            collate(rows[start : start + size], device=self.device, max_width=_max_width(self.model))
            for start in range(0, len(rows), size)
        ]
        num_labels = sum(batch.num_labels for batch in batches)
        loss_sum = torch.zeros((), device=self.device)
        for batch in batches:
            loss_sum += self._backward(batch, num_labels)
        loss = float(loss_sum)
        norm = float(self._clip())
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        factor = rate_factor(step, total_steps=self.total_steps, warmup=self.warmup, schedule=self.config.schedule)
        rate = self.config.learning_rate * factor
        if not skipped:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=skipped)
        return StepRecord(
            step=step,
            loss=loss,
            tokens=sum(batch.num_tokens for batch in batches),
            label_tokens=num_labels,
            seconds=time.perf_counter() - begin,
            learning_rate=rate,
            grad_norm=norm,
            skipped=skipped,
        )

    def _backward(self, batch: Batch, num_labels: int) -> Tensor:
        """Add the gradients of the batch's share of the step's mean loss; returns that share, detached."""
        positions = batch.tokens_BT.numel()
        self.positions += positions
        self.real_positions += batch.num_tokens - len(batch.tokens_BT)
        self.largest_batch = max(self.largest_batch, positions)
        watch = saved_activations(self.model) if not self.saved_per_position else contextlib.nullcontext()
        with watch as saved:
            loss = (
                _batch_loss(self.model, batch, precision=self.precision, head_parameters=self.head_parameters)
                / num_labels
            )
        if saved is not None:
            self.saved_per_position = saved.num_bytes / positions
        loss.backward()
        return loss.detach()

    def _clip(self) -> Tensor:
        limit = self.config.max_grad_norm
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    def evaluate(
        self,
        step: int,
        eval_examples: Sequence[TrainingExample] | None,
        on_eval: Callable[[int], Mapping[str, float]] | None,
    ) -> EvalRecord:
        begin = time.perf_counter()
        loss = None
        if eval_examples is not None:
            size = self.config.micro_batch_size
            loss = evaluate_loss(self.model, eval_examples, micro_batch_size=size, precision=self.precision)
        figures: Mapping[str, float] = {}
        if on_eval is not None:
            self.model.eval()
            figures = on_eval(step)
            self.model.train()
        return EvalRecord(step=step, loss=loss, seconds=time.perf_counter() - begin, figures=dict(figures))

    def _activations(self, parts: dict[str, int], meter: Meter | None) -> int:
        if meter is None:
            return int(self.saved_per_position * self.largest_batch)
        return max(0, meter.peak_bytes - meter.start_bytes - parts["gradients"] - parts["optimizer"])


def _batch_loss(model: nn.Module, batch: Batch, *, precision: str, head_parameters: Sequence[Tensor]) -> Tensor:
    device = batch.tokens_BT.device.type
    in_bfloat16 = model.dtype == torch.bfloat16
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16" and not in_bfloat16):
        # The decoder checkpoints its blocks only with an attention of its own making.
        attention = None if model.gradient_checkpointing else ShortCausal()
        hidden_BTD = model.hidden(batch.tokens_BT, attention=attention)  # type: ignore[operator]
        return masked_cross_entropy(
            hidden_BTD,
            batch.labels_BT,
            logits=model.logits,  # type: ignore[arg-type]
            vocab_size=model.config.vocab_size,  # type: ignore[union-attr]
            head_parameters=head_parameters,
        )


def _max_width(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def _check_examples(examples: Sequence[TrainingExample], role: str) -> None:
    if not examples:
        raise DataError(f"the {role} data has no rows", expected="at least one")
    for number, example in enumerate(examples, 1):
        if len(example.tokens) != len(example.labels):
            raise DataError(
                f"{role} row {number} has tokens and labels of different lengths",
                got=f"{len(example.tokens)} and {len(example.labels)}",
            )
        if not count_labels(example):
            raise DataError(
                f"{role} row {number} teaches nothing: all its labels are masked",
                remedy="Raise the maximum length, or leave the row out.",
            )


def _trainable_parameters(model: nn.Module, config: TrainConfig) -> list[nn.Parameter]:
    adapters = lora_parameters(model)
    if config.method == "lora":
        if not adapters:
            raise ConfigError('method "lora" needs a model that carries an adapter', remedy="Call attach_lora first.")
        model.requires_grad_(False)
        for parameter in adapters:
            parameter.requires_grad_(True)
        return adapters
    if adapters:
        raise ConfigError('method "full" cannot train a model that carries an adapter', remedy="Merge it first.")
    if any(buffer.dtype in (torch.int32, torch.uint8, torch.int8) for buffer in model.buffers()):
        raise ConfigError("quantized weights cannot be trained in full", remedy='Use method "lora".')
    model.requires_grad_(True)
    return list(model.parameters())


def _total_steps(num_rows: int, config: TrainConfig) -> int:
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil((config.epochs or 1.0) * num_rows / config.rows_per_step - 1e-9))


def _adamw(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2017, arXiv:1711.05101) in its fused form; decay on matrices only."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def _head_parameters(model: nn.Module, parameters: list[nn.Parameter]) -> list[Tensor]:
    reference = next(model.parameters())
    hidden_size: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
    probe = torch.zeros(1, hidden_size, dtype=reference.dtype, device=reference.device)
    return used_by_head(model.logits, probe, parameters)  # type: ignore[arg-type]


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device):
    """Seed dropout for the run, and give the caller's random state back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
