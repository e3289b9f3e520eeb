"""Noise on embeddings: its size per row, and when there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig, attach_lora
from burnish.train.neftune import embedding_noise
from burnish.train.results import TrainResult
from burnish.train.trainer import train


def test_noise_has_the_paper_s_size_for_each_row_of_a_packed_batch() -> None:
    embedding = nn.Embedding(11, 64)
    lengths = torch.tensor([[2] * 2 + [30] * 30])
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    with embedding_noise(embedding, 5.0) as noise:
        noise.lengths_BT = lengths
        torch.manual_seed(0)
        drawn = embedding(tokens) - embedding.weight[0]
    for part, length in ((drawn[:, :2], 2), (drawn[:, 2:], 30)):
        bound = 5.0 / math.sqrt(length * 64)
        assert part.abs().max() <= bound * 1.0001
        assert part.abs().max() > 0.9 * bound
        assert abs(part.mean()) < 0.15 * bound


def test_width_is_the_length_when_none_is_given_and_a_seed_repeats_the_noise() -> None:
    embedding, tokens = nn.Embedding(11, 8), torch.arange(6).view(2, 3)
    with embedding_noise(embedding, 1.0) as noise:
        torch.manual_seed(3)
        first = embedding(tokens)
        torch.manual_seed(3)
        noise.lengths_BT = torch.full((2, 1), 3)
        torch.testing.assert_close(embedding(tokens), first)


def test_no_noise_in_evaluation_without_gradients_with_alpha_0_or_afterwards() -> None:
    embedding, tokens = nn.Embedding(11, 8), torch.arange(6).view(2, 3)
    plain = embedding(tokens)
    with embedding_noise(embedding, 5.0):
        assert not torch.equal(embedding(tokens), plain)
        with torch.no_grad():
            assert torch.equal(embedding(tokens), plain)
        assert torch.equal(embedding.eval()(tokens), plain)
        embedding.train()
    assert torch.equal(embedding(tokens), plain)
    with embedding_noise(embedding, 0.0):
        assert torch.equal(embedding(tokens), plain)


def test_gradient_of_the_embedding_is_that_of_the_noisy_forward(make_decoder: Callable[..., Any]) -> None:
    decoder = make_decoder(tie_word_embeddings=True).train()
    tokens = torch.arange(8).view(1, 8)
    with embedding_noise(decoder.model.embed_tokens, 5.0):
        decoder(tokens).sum().backward()
    assert decoder.model.embed_tokens.weight.grad.isfinite().all()


@pytest.mark.parametrize("packing", [True, False])
def test_run_with_noise_is_repeated_by_its_seed_and_evaluates_without(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any], packing: bool
) -> None:
    def run(alpha: float, seed: int = 0) -> TrainResult:
        model, rows = make_decoder(), make_rows(8)
        attach_lora(model, LoraConfig(rank=4), seed=0)
        config = TrainConfig(
            precision="float32",
            steps=2,
            seed=seed,
            neftune=alpha,
            learning_rate=1e-9,
            packing=packing,
            ordering="given",
        )
        return train(model, rows, config=config, eval_examples=rows)

    noisy, plain = run(5.0), run(0.0)
    assert noisy.steps[0].loss != plain.steps[0].loss
    assert run(5.0).steps[0].loss == noisy.steps[0].loss
    assert run(5.0, seed=1).steps[0].loss != noisy.steps[0].loss
    assert noisy.eval[-1].loss == pytest.approx(plain.eval[-1].loss, abs=1e-6)
