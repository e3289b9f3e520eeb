"""KL and agreement equal a direct computation, and the gate judges by its limits."""

from __future__ import annotations

import math

import pytest
import torch
from measure_fakes import make_decoder

from burnish.errors import ConfigError
from burnish.measure.compare import Comparison, Gate, GateLimits, compare_models
from burnish.measure.perplexity import perplexity
from burnish.models.decoder import Decoder


def test_a_model_compared_with_itself_has_no_divergence(decoder: Decoder, sequences: list[list[int]]) -> None:
    found = compare_models(decoder, make_decoder(0), sequences)
    assert (found.kl_mean, found.kl_p99, found.kl_max) == (0.0, 0.0, 0.0)
    assert found.greedy_agreement == 1.0
    assert found.perplexity_child == found.perplexity_parent
    assert found.num_tokens == sum(len(tokens) - 1 for tokens in sequences)


@pytest.mark.parametrize(("batch_tokens", "chunk_tokens"), [(1, 1), (50, 9), (4096, 512)])
def test_divergence_and_agreement_equal_a_direct_computation(
    decoder: Decoder, other_decoder: Decoder, sequences: list[list[int]], batch_tokens: int, chunk_tokens: int
) -> None:
    divergences, agreed = [], []
    for tokens in sequences:
        with torch.no_grad():
            child = decoder(torch.tensor([tokens]))[0, :-1].double().softmax(-1)
            parent = other_decoder(torch.tensor([tokens]))[0, :-1].double().softmax(-1)
        divergences.append((parent * (parent / child).log()).sum(-1))
        agreed.append(child.argmax(-1) == parent.argmax(-1))
    expected, same = torch.cat(divergences), torch.cat(agreed)
    found = compare_models(
        decoder, other_decoder, sequences, batch_tokens=batch_tokens, chunk_tokens=chunk_tokens, positions="all"
    )
    assert found.kl_mean == pytest.approx(expected.mean().item(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(expected.quantile(0.99).item(), rel=1e-4)
    assert found.kl_max == pytest.approx(expected.max().item(), rel=1e-4)
    assert found.kl_mean > 0.1
    assert found.greedy_agreement == pytest.approx(same.double().mean().item())
    assert found.perplexity_child == pytest.approx(perplexity(decoder, sequences).perplexity, rel=1e-4)
    assert found.perplexity_parent == pytest.approx(perplexity(other_decoder, sequences).perplexity, rel=1e-4)


def test_different_vocabularies_are_refused(decoder: Decoder, sequences: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="61 and 70 tokens"):
        compare_models(decoder, make_decoder(0, vocab_size=70), sequences)


def test_a_model_of_nan_has_no_figures_and_fails_every_limit(sequences: list[list[int]], decoder: Decoder) -> None:
    broken = make_decoder(0)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)  # type: ignore[union-attr]
    found = compare_models(broken, decoder, sequences)
    assert math.isnan(found.kl_mean)
    verdict = Gate(GateLimits(max_kl_mean=100.0)).judge(found)
    assert verdict.verdict == "fail"


def comparison(**changed: float) -> Comparison:
    figures = {
        "kl_mean": 0.01,
        "kl_p99": 0.2,
        "kl_max": 0.5,
        "greedy_agreement": 0.99,
        "perplexity_child": 2.2,
        "perplexity_parent": 2.0,
        **changed,
    }
    return Comparison(**figures, num_tokens=10, num_sequences=1, positions="labels")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (GateLimits(max_kl_mean=0.001), "mean KL is 0.01, more than 0.001"),
        (GateLimits(max_kl_p99=0.1), "p99 KL"),
        (GateLimits(min_greedy_agreement=0.999), "greedy agreement is 0.99, less than 0.999"),
        (GateLimits(max_perplexity_ratio=1.05), "perplexity ratio is 1.1"),
        (GateLimits(max_score_drop=0.01), "score drop is 0.05"),
        (GateLimits(min_score=0.9), "score is 0.8, less than 0.9"),
    ],
)
def test_gate_names_the_limit_that_was_broken_and_the_worst_layers(limits: GateLimits, words: str) -> None:
    layers = [("a", 0.1), ("b", 0.9), ("c", 0.5), ("d", 0.2)]
    verdict = Gate(limits).judge(comparison(), score=0.8, parent_score=0.85, worst_layers=layers)
    assert verdict.verdict == "fail"
    assert words in verdict.reasons[0]
    assert verdict.reasons[1] == "worst layers: b (0.9), c (0.5), d (0.2)"


def test_gate_passes_at_its_limits_exactly() -> None:
    limits = GateLimits(max_kl_mean=0.01, min_greedy_agreement=0.99, max_score_drop=0.0)
    verdict = Gate(limits).judge(comparison(), score=0.8, parent_score=0.8)
    assert verdict.passed
    assert verdict.reasons == ()


def test_a_limit_without_its_figure_is_an_error() -> None:
    with pytest.raises(ConfigError, match="score drop"):
        Gate(GateLimits(max_score_drop=0.1)).judge(comparison(), score=0.8)
