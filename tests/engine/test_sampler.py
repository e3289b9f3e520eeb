"""Each rule keeps the tokens it should, draws follow the distribution, and a row's draw is its own affair."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from burnish.engine.sampler import Sampler
from burnish.engine.sampling import SamplingParams
from burnish.engine.sequence import Sequence
from burnish.engine.text_stream import TextStream


class Silent:
    def push(self, token_id: int, /) -> str:
        return ""

    def flush(self) -> str:
        return ""


def sequence(prompt: list[int] | None = None, *, ends: tuple[int, ...] = (), **settings: Any) -> Sequence:
    params = SamplingParams(**settings)
    return Sequence(
        request_id=0,
        index=0,
        prompt=None,
        prompt_ids=prompt or [0],
        params=params,
        end_ids=frozenset(ends),
        max_tokens=params.max_tokens,
        text=TextStream(Silent()),
    )


def draw_many(logits: list[float], count: int, **settings: Any) -> Counter[int]:
    """Draws with seeds 0, 1, 2, ... in one batch."""
    sequences = [sequence(seed=seed, **settings) for seed in range(count)]
    return Counter(Sampler().sample(torch.tensor([logits] * count), sequences))


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampler().sample(torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]]), [sequence(), sequence()]) == [1, 0]


def test_draws_follow_the_tempered_distribution() -> None:
    logits, temperature, count = [0.0, 1.0, 2.0, -1.0], 0.7, 4000
    drawn = draw_many(logits, count, temperature=temperature)
    for token, share in enumerate(torch.softmax(torch.tensor(logits) / temperature, -1).tolist()):
        assert drawn[token] / count == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / count))


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(draw_many([0.0, 1.0, 0.5, -1.0], 300, temperature=5.0, top_k=2)) == {1, 2}


def test_top_p_keeps_the_smallest_sufficient_set() -> None:
    logits = [math.log(share) for share in (0.1, 0.5, 0.3, 0.1)]
    assert set(draw_many(logits, 300, temperature=1.0, top_p=0.49)) == {1}
    assert set(draw_many(logits, 300, temperature=1.0, top_p=0.51)) == {1, 2}
    assert set(draw_many(logits, 300, temperature=1.0, top_k=2, top_p=0.6)) == {1}


def test_top_p_over_a_flat_vocabulary_sorts_all_of_it() -> None:
    drawn = draw_many([0.0] * 2000, 400, temperature=1.0, top_p=0.9)
    assert len(drawn) > 320
    assert max(drawn) < 1801


def test_min_p_drops_the_unlikely() -> None:
    logits = [math.log(share) for share in (0.05, 0.5, 0.3, 0.15)]
    assert set(draw_many(logits, 400, temperature=1.0, min_p=0.25)) == {1, 2, 3}
    assert set(draw_many(logits, 400, temperature=1.0, min_p=0.5, top_p=0.99)) == {1, 2}


def test_tiny_temperature_is_greedy_without_overflow() -> None:
    assert set(draw_many([1e4, 2e4, -1e4], 20, temperature=1e-6)) == {1}


def test_repetition_penalty_equals_transformers() -> None:
    logits_V = torch.tensor([2.0, -2.0, 1.5, -1.9, 0.3])
    one = sequence([0, 3, 3], repetition_penalty=1.7)
    one.token_ids.append(1)
    expected_V = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[0, 3, 3, 1]]), logits_V[None])[0]
    logits_BV = logits_V[None].clone()
    assert Sampler().sample(logits_BV, [one]) == [int(expected_V.argmax())] == [2]
    torch.testing.assert_close(logits_BV[0], expected_V)


def test_end_tokens_are_banned_until_min_tokens() -> None:
    one = sequence(ends=(1, 900), min_tokens=1)
    sampler = Sampler()
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    assert sampler.sample(logits.clone(), [one]) == [2]
    one.token_ids.append(2)
    assert sampler.sample(logits.clone(), [one]) == [1]


def test_draw_depends_on_own_row_only() -> None:
    logits_BV = torch.randn((5, 600), generator=torch.Generator().manual_seed(0))
    settings = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "seed": 2, "top_p": 0.9},
        {},
        {"temperature": 1.4, "seed": 3, "top_k": 40, "min_p": 0.02},
        {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.3},
    ]
    together = Sampler().sample(logits_BV.clone(), [sequence([1, 2], **one) for one in settings])
    alone = [
        Sampler().sample(logits_BV[row : row + 1].clone(), [sequence([1, 2], **one)])[0]
        for row, one in enumerate(settings)
    ]
    assert together == alone


def test_position_changes_the_draw() -> None:
    one = sequence(temperature=1.0, seed=0, max_tokens=500)
    sampler, drawn = Sampler(), set()
    for _ in range(20):
        [token] = sampler.sample(torch.zeros((1, 50)), [one])
        one.token_ids.append(token)
        drawn.add(token)
    assert len(drawn) > 5
