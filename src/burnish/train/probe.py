"""A short trial before training begins: what a step with the longest rows takes, in memory and time.

Nothing is left behind: weights, random state and gradients are as before, no optimizer exists yet. Memory that its
state will take is held while the trial runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from burnish.train.batches import TrainingExample
from burnish.train.config import TrainConfig
from burnish.train.freezing import trainable_parameters
from burnish.train.packing import split_step
from burnish.train.precision import frozen_in_bfloat16, frozen_linears_in_float16, resolve_precision
from burnish.train.run import Meter
from burnish.train.step import StepRunner

MOST_MICRO_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What was measured.

    Attributes:
        peak_bytes: as the meter counts; the optimizer's state is in it.
        tokens_per_s: real tokens of the second pass over the rows; the first compiles kernels.
        seconds: the whole trial.
        rows, tokens: of one pass.
    """

    peak_bytes: int
    tokens_per_s: float
    seconds: float
    rows: int
    tokens: int


def probe(
    model: nn.Module,
    rows: Sequence[TrainingExample],
    *,
    config: TrainConfig,
    state_bytes: int,
    metered: Callable[[], AbstractContextManager[Meter]],
) -> ProbeResult:
    """Forward and backward over a few micro-batches of `rows`, twice.

    Args:
        model: as it will be trained, adapters attached.
        rows: of one step; those of the first micro-batches are taken, which hold the longest.
        state_bytes: of the optimizer.
        metered: a fresh memory meter.
    """
    begin = time.perf_counter()
    parameters = trainable_parameters(model, config)
    device = parameters[0].device
    precision = resolve_precision(model, config)
    some = _first_micro_batches(rows, config, device)
    modes = [(module, module.training) for module in model.modules()]
    before = model.gradient_checkpointing, model.checkpoint_every  # type: ignore[union-attr]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        meter = stack.enter_context(metered())
        stack.enter_context(frozen_in_bfloat16(model, enabled=precision == "bfloat16" and config.method != "full"))
        stack.enter_context(frozen_linears_in_float16(model, enabled=precision == "float16"))
        runner = StepRunner(model, parameters, config, precision)
        stack.enter_context(runner.prepared())
        try:
            model.train()
            model.gradient_checkpointing = config.gradient_checkpointing  # type: ignore[assignment]
            model.checkpoint_every = config.checkpoint_every  # type: ignore[assignment]
            # Written to: memory that nobody touched does not count.
            state = torch.ones(state_bytes, dtype=torch.uint8, device=device)
            runner.accumulate(some)
            started = time.perf_counter()
            totals = runner.accumulate(some)
            seconds = time.perf_counter() - started
            peak = meter.peak_bytes
            del state
        finally:
            for parameter in parameters:
                parameter.grad = None
            model.gradient_checkpointing, model.checkpoint_every = before  # type: ignore[assignment]
            for module, mode in modes:
                module.training = mode
    return ProbeResult(
        peak_bytes=peak,
        tokens_per_s=totals.tokens / seconds,
        seconds=time.perf_counter() - begin,
        rows=len(some),
        tokens=totals.tokens,
    )


def _first_micro_batches(
    rows: Sequence[TrainingExample], config: TrainConfig, device: torch.device
) -> list[TrainingExample]:
    most = config.tokens_at_once(device.type)
    if most is None:
        return list(rows[: MOST_MICRO_BATCHES * config.micro_batch_size])
    parts = split_step(rows, max_rows=config.micro_batch_size, max_tokens=most)
    return [row for part in parts[:MOST_MICRO_BATCHES] for row in part]
