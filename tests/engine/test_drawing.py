"""The tokens kept are transformers' (and the stated ones at ties); the choice follows the kept weights exactly."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from burnish.engine.drawing import draw, filter_weights, invert, tempered_weights
from burnish.engine.sampling import SamplingParams


def kept(logits_BV: Tensor, settings: list[dict[str, Any]]) -> Tensor:
    """The distribution after temperature and filters, normalised."""
    params = [SamplingParams(**one) for one in settings]
    weights_BV = tempered_weights(logits_BV, params)
    filter_weights(weights_BV, params)
    return weights_BV / weights_BV.sum(dim=-1, keepdim=True)


def kept_by_transformers(logits_V: Tensor, one: dict[str, Any]) -> Tensor:
    tokens: Any = torch.zeros((1, 1), dtype=torch.long)
    scores: Any = logits_V[None]
    for warper, name in (
        (TemperatureLogitsWarper, "temperature"),
        (TopKLogitsWarper, "top_k"),
        (TopPLogitsWarper, "top_p"),
        (MinPLogitsWarper, "min_p"),
    ):
        if name in one:
            scores = warper(one[name])(tokens, scores)
    return scores[0].softmax(dim=-1)


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"temperature": st.floats(0.2, 3.0)},
            optional={
                "top_k": st.integers(1, 400),
                "top_p": st.floats(0.05, 0.999),
                "min_p": st.floats(0.001, 0.9),
            },
        ),
        min_size=1,
        max_size=4,
    ),
    vocabulary=st.sampled_from([7, 64, 300, 1000]),
    spread=st.floats(0.1, 6.0),
    seed=st.integers(0, 99),
)
def test_kept_tokens_equal_transformers(rows: list[dict[str, Any]], vocabulary: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_BV = spread * torch.randn((len(rows), vocabulary), generator=generator)
    found_BV = kept(logits_BV.clone(), rows)
    for one, logits_V, found_V in zip(rows, logits_BV, found_BV):
        expected_V = kept_by_transformers(logits_V, one)
        # A border within rounding of top_p may fall either way: then one token more or less is kept.
        differing = ((found_V > 0) != (expected_V > 0)).nonzero()[:, 0]
        assert len(differing) <= ("top_p" in one)
        if len(differing):
            whole_V = kept_by_transformers(logits_V, {key: one[key] for key in one if key in ("temperature", "top_k")})
            above = float(whole_V[whole_V > whole_V[differing[0]]].sum())
            assert above == pytest.approx(one["top_p"], abs=1e-4)
        else:
            torch.testing.assert_close(found_V, expected_V, rtol=1e-4, atol=1e-7)


def test_ties_at_the_border_go_to_the_lowest_ids() -> None:
    logits_BV = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0]] * 5)
    settings: list[dict[str, Any]] = [
        {"top_k": 1},
        {"top_k": 3},
        {"top_p": 0.3},
        {"top_k": 4, "top_p": 0.8},
        {"min_p": 0.3},
    ]
    found_BV = kept(logits_BV, [{"temperature": 1.0, **one} for one in settings])
    assert [row.nonzero()[:, 0].tolist() for row in found_BV] == [
        [1],
        [0, 1, 4],
        [1],
        [0, 1, 4],
        [0, 1, 2, 3, 4],
    ]


def test_flat_distribution_beyond_the_candidates_is_cut_where_it_should() -> None:
    found_BV = kept(torch.zeros((1, 2000)), [{"temperature": 1.0, "top_p": 0.9}])
    assert found_BV[0].nonzero()[:, 0].tolist() == list(range(1800))


def test_tiny_temperature_does_not_overflow() -> None:
    params = SamplingParams(temperature=1e-9)
    assert draw(torch.tensor([[1e4, 2e4, -1e30, 1.9999e4]]), [params], [0.999]).tolist() == [1]


@pytest.mark.parametrize("vocabulary", [1, 7, 255, 256, 257, 1000])
def test_inversion_gives_each_token_its_own_interval(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    weights_V = torch.rand(vocabulary, generator=generator)
    weights_V[::3] = 0.0
    if vocabulary == 1:
        weights_V[0] = 0.5
    edges = weights_V.double().cumsum(0) / weights_V.double().sum()
    tokens = weights_V.nonzero()[:, 0]
    middles = torch.tensor([float(edges[i] + (edges[i - 1] if i else 0.0)) / 2 for i in tokens.tolist()])
    found_B = invert(weights_V.repeat(len(tokens), 1), middles.double())
    assert found_B.tolist() == tokens.tolist()


@given(point=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 20), vocabulary=st.integers(1, 600))
def test_inversion_never_takes_a_token_of_weight_zero(point: float, seed: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights_V = torch.rand(vocabulary, generator=generator) ** 20
    weights_V[torch.rand(vocabulary, generator=generator) < 0.9] = 0.0
    weights_V[int(torch.randint(vocabulary, (1,), generator=generator))] = 1.0
    [token] = invert(weights_V[None], torch.tensor([point], dtype=torch.float64)).tolist()
    assert weights_V[token] > 0


def test_even_points_reproduce_the_distribution() -> None:
    shares = torch.tensor([0.1, 0.0, 0.45, 0.05, 0.4])
    count = 2000
    points = [(index + 0.5) / count for index in range(count)]
    params = [SamplingParams(temperature=1.0)] * count
    drawn = Counter(draw(shares.log().repeat(count, 1), params, points).tolist())
    assert {token: pytest.approx(count * float(share), abs=1.5) for token, share in enumerate(shares) if share} == drawn


def test_rows_do_not_see_their_neighbours() -> None:
    generator = torch.Generator().manual_seed(4)
    logits_BV = 3 * torch.randn((6, 5000), generator=generator).bfloat16().float()  # with many ties
    params = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_k=50),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=9.0, top_p=0.99),
        SamplingParams(temperature=1.5, top_k=300, top_p=0.8, min_p=0.001),
        SamplingParams(temperature=1.0, min_p=0.01),
    ]
    for step in range(50):
        points = [math.modf(0.137 * step + 0.61 * row)[0] for row in range(6)]
        together = draw(logits_BV, params, points).tolist()
        alone = [int(draw(logits_BV[row : row + 1], params[row : row + 1], points[row : row + 1])) for row in range(6)]
        assert together == alone
