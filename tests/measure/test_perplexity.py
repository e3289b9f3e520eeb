"""Perplexity equals a direct computation, whatever the windows, batches and chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.errors import DataError
from burnish.measure.perplexity import perplexity
from burnish.measure.scoring import make_spans
from burnish.models.decoder import Decoder


@dataclass
class Labelled:
    tokens: list[int]
    labels: list[int]


def direct_losses(decoder: Decoder, tokens: list[int]) -> Tensor:
    """Negative log likelihood of every token but the first, one plain forward."""
    with torch.no_grad():
        logits_TV = decoder(torch.tensor([tokens]))[0, :-1]
    return F.cross_entropy(logits_TV, torch.tensor(tokens[1:]), reduction="none")


@pytest.mark.parametrize(("batch_tokens", "chunk_tokens"), [(1, 1), (64, 7), (4096, 1000)])
def test_perplexity_equals_a_direct_computation(
    decoder: Decoder, sequences: list[list[int]], batch_tokens: int, chunk_tokens: int
) -> None:
    losses = torch.cat([direct_losses(decoder, tokens) for tokens in sequences])
    found = perplexity(decoder, sequences, batch_tokens=batch_tokens, chunk_tokens=chunk_tokens)
    assert found.num_tokens == len(losses)
    assert found.num_sequences == len(sequences)
    assert found.nll_mean == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(losses.mean().item()), rel=1e-5)


def test_labels_choose_the_tokens_that_are_scored(decoder: Decoder, sequences: list[list[int]]) -> None:
    tokens = sequences[3]
    example = Labelled(tokens=tokens, labels=[-100] * 30 + tokens[30:])
    found = perplexity(decoder, [example], positions="labels")
    assert found.num_tokens == 10
    assert found.nll_mean == pytest.approx(direct_losses(decoder, tokens)[29:].mean().item(), rel=1e-5)
    assert perplexity(decoder, [example], positions="all").num_tokens == 39


def test_windows_score_every_token_once_with_the_context_that_fits(
    decoder: Decoder, sequences: list[list[int]]
) -> None:
    tokens = sequences[3]
    expected = []
    for target in range(1, len(tokens)):
        begin = 0 if target < 16 else 6 * math.ceil((target - 15) / 6)
        expected.append(direct_losses(decoder, tokens[begin : target + 1])[-1].item())
    found = perplexity(decoder, [tokens], window=16, stride=6)
    assert found.num_tokens == 39
    assert found.nll_mean == pytest.approx(sum(expected) / 39, rel=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (8, 3), (16, 15), (64, 32)])
def test_spans_cover_every_position_exactly_once(window: int, stride: int) -> None:
    for length in range(2, 70):
        spans = make_spans([list(range(length))], window=window, stride=stride)
        scored = sorted(span.tokens[target] for span in spans for target in span.targets)
        assert scored == list(range(1, length))
        assert max(len(span.tokens) for span in spans) <= window


def test_dropout_is_off_while_scoring_and_the_mode_is_put_back(decoder: Decoder, sequences: list[list[int]]) -> None:
    decoder.train()
    try:
        seen = []
        handle = decoder.register_forward_pre_hook(lambda module, _: seen.append(module.training))
        perplexity(decoder, sequences)
        handle.remove()
        assert decoder.training
        assert not any(seen)
    finally:
        decoder.eval()


@pytest.mark.parametrize("empty", [[], [[5]], [Labelled(tokens=[1, 2, 3], labels=[-100] * 3)]])
def test_nothing_to_score_is_an_error(decoder: Decoder, empty: list[object]) -> None:
    with pytest.raises(DataError, match="nothing to score"):
        perplexity(decoder, empty, positions="labels")  # type: ignore[arg-type]


def test_windows_that_do_not_overlap_are_refused() -> None:
    with pytest.raises(DataError, match="stride 8"):
        make_spans([[1, 2, 3]], window=8, stride=8)
