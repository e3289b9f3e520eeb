"""The trial before training: measured, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from burnish.models.decoder import Decoder
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig, attach_lora
from burnish.train.probe import probe
from burnish.train.trainer import train


@dataclass
class FakeMeter:
    start_bytes: int = 0
    peak_bytes: int = 7


@contextmanager
def metered() -> Iterator[FakeMeter]:
    yield FakeMeter()


@pytest.mark.parametrize(
    ("method", "precision", "dropout"), [("lora", "float32", 0.0), ("lora", "bfloat16", 0.1), ("full", "bfloat16", 0.0)]
)
def test_a_run_is_bitwise_the_same_with_and_without_it(
    make_decoder: Callable[..., Decoder],
    make_rows: Callable[..., list[Any]],
    method: Any,
    precision: Any,
    dropout: float,
) -> None:
    rows = make_rows(16)
    config = TrainConfig(method=method, precision=precision, steps=3, micro_batch_size=4, gradient_checkpointing=True)

    def run(*, tried: bool) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(3)
        model = make_decoder()
        if method == "lora":
            attach_lora(model, LoraConfig(rank=4, dropout=dropout), seed=0)
        if tried:
            result = probe(model, rows[:8], config=config, state_bytes=64, metered=metered)
            assert result.peak_bytes == 7
            assert result.tokens_per_s > 0
            assert not model.training
            assert not model.gradient_checkpointing
            assert all(parameter.grad is None for parameter in model.parameters())
        losses = [step.loss for step in train(model, rows, config=config).steps]
        return losses, dict(model.state_dict()), torch.get_rng_state()

    losses, weights, random = run(tried=True)
    other_losses, other_weights, other_random = run(tried=False)
    assert losses == other_losses
    assert all(torch.equal(weights[name], other_weights[name]) for name in other_weights)
    assert torch.equal(random, other_random)
