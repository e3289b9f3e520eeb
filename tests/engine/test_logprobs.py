"""Reported log-probabilities are those of the model's own distribution, computed here the long way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from burnish.engine.logprobs import PromptLogprobs
from burnish.engine.sampler import Sampler
from burnish.engine.sequence import Sequence


def long_way(logits: list[float]) -> list[float]:
    total = math.fsum(math.exp(value) for value in logits)
    return [value - math.log(total) for value in logits]


def test_sampled_logprobs_are_those_before_every_rule(make_sequence: Callable[..., Sequence]) -> None:
    logits = [[0.5, 2.0, -1.0, 1.0], [3.0, 0.0, 0.1, 0.2], [1.0, 1.5, 0.0, -2.0]]
    sequences = [
        make_sequence([1], logprobs=2, repetition_penalty=9.0, logit_bias={0: 50}),
        make_sequence([1]),
        make_sequence([1], logprobs=0, temperature=0.01, top_k=1, ends=[1], min_tokens=1),
    ]
    first, second, third = Sampler().sample(torch.tensor(logits), sequences)
    expected = long_way(logits[0])
    assert first.token_id == 0
    assert first.logprob is not None
    assert first.logprob.logprob == pytest.approx(expected[0], abs=1e-6)
    assert [token for token, _ in first.logprob.top] == [1, 3]
    assert [value for _, value in first.logprob.top] == pytest.approx([expected[1], expected[3]], abs=1e-6)
    assert second == (0, None, None)
    assert third.token_id == 0
    assert third.logprob is not None
    assert third.logprob.logprob == pytest.approx(long_way(logits[2])[0], abs=1e-6)
    assert third.logprob.top == ()


def test_top_is_never_more_than_the_vocabulary(make_sequence: Callable[..., Sequence]) -> None:
    [one] = Sampler().sample(torch.tensor([[1.0, 2.0]]), [make_sequence(logprobs=20)])
    assert one.logprob is not None
    assert [token for token, _ in one.logprob.top] == [1, 0]


def test_asking_for_logprobs_does_not_change_the_draw(make_sequence: Callable[..., Sequence]) -> None:
    logits_BV = torch.randn((1, 300), generator=torch.Generator().manual_seed(0))
    for seed in range(30):
        plain = make_sequence(temperature=1.0, top_p=0.8, seed=seed)
        asking = make_sequence(temperature=1.0, top_p=0.8, seed=seed, logprobs=5)
        [one], [two] = (Sampler().sample(logits_BV.clone(), [sequence]) for sequence in (plain, asking))
        assert one.token_id == two.token_id


@given(
    length=st.integers(1, 150),
    cuts=st.lists(st.integers(0, 150), max_size=4),
    again=st.integers(0, 20),
    tail=st.integers(0, 3),
)
def test_prompt_logprobs_in_pieces_equal_those_in_one(length: int, cuts: list[int], again: int, tail: int) -> None:
    """Pieces of any sizes, some positions read twice, some beyond the prompt."""
    generator = torch.Generator().manual_seed(length)
    prompt = torch.randint(0, 11, (length,), generator=generator).tolist()
    logits_TV = torch.randn((length + tail, 11), generator=generator)
    scored = PromptLogprobs(3, prompt)
    edges = sorted({0, length + tail, *(cut for cut in cuts if cut < length + tail)})
    for begin, end in itertools.pairwise(edges):
        start = max(0, begin - again)
        scored.add(logits_TV[start:end], start=start)
    assert scored.complete
    found = scored.result()
    assert len(found) == length
    assert found[0] is None
    expected_TV = logits_TV.double().log_softmax(dim=-1)
    for position, entry in enumerate(found[1:], start=1):
        assert entry is not None
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(float(expected_TV[position - 1, prompt[position]]), abs=1e-5)
        values, ids = expected_TV[position - 1].topk(3)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_prompt_logprobs_with_a_gap_are_a_defect() -> None:
    scored = PromptLogprobs(0, [1, 2, 3, 4])
    with pytest.raises(AssertionError, match="left out"):
        scored.add(torch.zeros((1, 5)), start=1)
