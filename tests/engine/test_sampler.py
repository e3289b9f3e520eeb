"""The rules together: each row's choice is its own affair, and drafts change nothing but the number of steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.engine.sampled import Sampled
from burnish.engine.sampler import Sampler, accept_greedy
from burnish.engine.sequence import Sequence
from burnish.errors import BurnishError

MakeSequence = Callable[..., Sequence]

# Rules in many combinations, for the tests that hold whatever is asked.
RULES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.3, 2.0),
        "top_k": st.integers(1, 9),
        "top_p": st.floats(0.3, 0.99),
        "min_p": st.floats(0.01, 0.5),
        "repetition_penalty": st.floats(0.8, 1.6),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(0, 10), st.floats(-5, 5), max_size=3),
        "min_tokens": st.integers(1, 6),
        "logprobs": st.integers(0, 3),
    },
)
VOCAB = 11


def model(context: list[int]) -> Tensor:
    """A little language model: peaked logits (V,) that depend on the last two tokens."""
    generator = torch.Generator().manual_seed(hash(tuple(context[-2:])))
    return 2.0 * torch.randn(VOCAB, generator=generator)


def drawn(results: list[Sampled]) -> list[int]:
    return [one.token_id for one in results]


def test_greedy_takes_the_first_of_the_largest(make_sequence: MakeSequence) -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert drawn(Sampler().sample(logits_BV, [make_sequence(), make_sequence()])) == [1, 0]


@pytest.mark.parametrize("setting", [{}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.05}])
def test_draws_follow_the_distribution(setting: dict[str, Any], make_sequence: MakeSequence) -> None:
    """Pearson's statistic over seeds 0, 1, 2, ...: with fixed seeds its value is fixed as well."""
    logits, temperature, count = [0.0, 1.0, 2.0, -1.0, 0.3, -6.0], 0.7, 4000
    sequences = [make_sequence(seed=seed, temperature=temperature, **setting) for seed in range(count)]
    found = Counter(drawn(Sampler().sample(torch.tensor([logits] * count), sequences)))
    weights = [math.exp(value / temperature) for value in logits]
    if setting:
        kept = {"top_k": [0, 1, 2, 4], "top_p": [0, 1, 2, 4], "min_p": [0, 1, 2, 4]}[next(iter(setting))]
        order = sorted(weights, reverse=True)
        if "top_p" in setting:  # by hand: the smallest set that reaches 0.9
            total, running, kept = sum(weights), 0.0, []
            for weight in order:
                if running < 0.9 * total:
                    kept.append(weights.index(weight))
                running += weight
        if "min_p" in setting:
            kept = [token for token, weight in enumerate(weights) if weight >= 0.05 * order[0]]
        weights = [weight if token in kept else 0.0 for token, weight in enumerate(weights)]
    expected = [count * weight / sum(weights) for weight in weights]
    assert set(found) <= {token for token, mean in enumerate(expected) if mean}
    large = [token for token, mean in enumerate(expected) if mean >= 5]
    statistic = sum((found[token] - expected[token]) ** 2 / expected[token] for token in large)
    assert statistic < 18.5  # exceeded once in 400 by true draws with five degrees of freedom


def test_places_of_one_answer_are_drawn_independently(make_sequence: MakeSequence) -> None:
    """Pairs of neighbouring draws from a flat distribution over four tokens fill all sixteen cells alike."""
    one = make_sequence(temperature=1.0, seed=0, max_tokens=4000)
    sampler = Sampler()
    for _ in range(3200):
        one.token_ids += drawn(sampler.sample(torch.zeros((1, 4)), [one]))
    pairs = Counter(zip(one.token_ids[::2], one.token_ids[1::2]))
    assert len(pairs) == 16
    assert sum((count - 100) ** 2 / 100 for count in pairs.values()) < 34  # 15 degrees: exceeded once in 300


def test_choices_of_one_request_differ_and_repeat(make_sequence: MakeSequence) -> None:
    def choices() -> list[int]:
        sequences = [make_sequence(temperature=1.0, seed=5, n=8, choice=choice) for choice in range(8)]
        return drawn(Sampler().sample(torch.zeros((8, 1000)), sequences))

    assert len(set(choices())) > 5
    assert choices() == choices()


def test_without_a_seed_sequences_draw_differently(make_sequence: MakeSequence) -> None:
    sequences = [make_sequence(temperature=1.0) for _ in range(8)]
    sampler = Sampler()
    first = drawn(sampler.sample(torch.zeros((8, 100000)), sequences))
    assert len(set(first)) > 5
    # A step that is run anew, as after a failure, draws the same.
    assert drawn(sampler.sample(torch.zeros((8, 100000)), sequences)) == first


def test_logit_bias_is_added_before_the_choice(make_sequence: MakeSequence) -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 2.5, 1.0]] * 3)
    biases: list[dict[int, float]] = [{2: 0.6}, {1: -100, 2: -100}, {0: 100}]
    assert drawn(Sampler().sample(logits_BV, [make_sequence(logit_bias=bias) for bias in biases])) == [2, 3, 0]


def test_end_tokens_are_banned_until_min_tokens(make_sequence: MakeSequence) -> None:
    one = make_sequence(ends=(1, 900), min_tokens=1)
    sampler = Sampler()
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    assert sampler.needs_logits(one)
    assert drawn(sampler.sample(logits.clone(), [one])) == [2]
    one.token_ids.append(2)
    assert not sampler.needs_logits(one)
    assert drawn(sampler.sample(logits.clone(), [one])) == [1]


@pytest.mark.parametrize(
    ("setting", "needs"),
    [
        ({}, False),
        ({"n": 2, "seed": 1, "top_k": 3}, False),
        ({"temperature": 0.1}, True),
        ({"logprobs": 0}, True),
        ({"logit_bias": {1: 1.0}}, True),
        ({"frequency_penalty": 0.5}, True),
        ({"regex": "a"}, True),
        ({"prompt_logprobs": 0}, True),
        ({"min_tokens": 3}, False),  # no end token to ban
    ],
)
def test_needs_logits_for_all_but_the_plain(setting: dict[str, Any], needs: bool, make_sequence: MakeSequence) -> None:
    assert Sampler.needs_logits(make_sequence(**setting)) is needs


def test_prompt_logprobs_need_logits_until_the_answer_begins(make_sequence: MakeSequence) -> None:
    assert not Sampler.needs_logits(make_sequence(prompt_logprobs=0, answer=[1]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("setting", [{}, {"temperature": 1.0}, {"logit_bias": {1: 1.0}}])
def test_logits_that_are_no_numbers_are_an_error(
    value: float, setting: dict[str, Any], make_sequence: MakeSequence
) -> None:
    logits_BV = torch.zeros((2, 5))
    logits_BV[1, 3] = value
    with pytest.raises(BurnishError, match="not numbers"):
        Sampler().sample(logits_BV, [make_sequence(), make_sequence(**setting)])


@given(rules=st.lists(RULES, min_size=2, max_size=5), seed=st.integers(0, 9))
@settings(max_examples=60)
def test_a_row_is_its_own_affair(rules: list[dict[str, Any]], seed: int, make_sequence: MakeSequence) -> None:
    logits_BV = torch.randn((len(rows := rules), VOCAB), generator=torch.Generator().manual_seed(seed))

    def one(row: int) -> Sequence:
        return make_sequence([1, 2, 2], answer=[3, 4, 4], ends=[0], seed=seed + row, **rows[row])

    together = Sampler().sample(logits_BV.clone(), [one(row) for row in range(len(rows))])
    for row, found in enumerate(together):
        [alone] = Sampler().sample(logits_BV[row : row + 1].clone(), [one(row)])
        assert found.token_id == alone.token_id
        assert (found.logprob is None) == (rows[row].get("logprobs") is None)


@given(rules=RULES, seed=st.integers(0, 50), data=st.data())
@settings(max_examples=120)
def test_drafts_do_not_change_the_answer(
    rules: dict[str, Any], seed: int, data: st.DataObject, make_sequence: MakeSequence
) -> None:
    """Right drafts, wrong ones and half right ones, against one token at a time."""
    prompt, ends = [3, 1, 4], [0]

    def make() -> Sequence:
        return make_sequence(prompt, ends=ends, seed=seed, max_tokens=16, **rules)

    sampler, plain = Sampler(), make()
    reports = []
    while not plain.finished:
        [sampled] = sampler.sample(model([*prompt, *plain.token_ids])[None], [plain])
        reports.append(sampled.logprob)
        plain.append(sampled.token_id, now_s=0.0)

    drafted, found, steps = make(), [], 0
    while not drafted.finished:
        at = len(drafted.token_ids)
        right = data.draw(st.integers(0, 5))
        drafts = [*plain.token_ids[at : at + right], *data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=3))]
        context = [*prompt, *drafted.token_ids]
        logits_KV = torch.stack([model([*context, *drafts[:place]]) for place in range(len(drafts) + 1)])
        if sampler.needs_logits(drafted):
            accepted = sampler.verify(logits_KV, drafts, drafted)
        else:
            accepted = accept_greedy(logits_KV.argmax(dim=-1).tolist(), drafts, drafted)
        assert len(accepted) >= min(right, len(plain.token_ids) - 1 - at) + 1
        steps += 1
        for sampled in accepted:
            if not drafted.finished:
                found.append(sampled.logprob)
                drafted.append(sampled.token_id, now_s=0.0)
    assert drafted.token_ids == plain.token_ids
    for one, other in zip(reports, found):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_nothing_is_accepted_after_an_end_token(make_sequence: MakeSequence) -> None:
    logits_KV = torch.eye(5)[[1, 0, 3]]
    for sequence in (make_sequence(ends=[0]), make_sequence(ends=[0], frequency_penalty=0.001)):
        assert drawn(Sampler().verify(logits_KV.clone(), [1, 0], sequence)) == [1, 0]
    assert drawn(accept_greedy([1, 0, 3], [1, 0], make_sequence(ends=[0]))) == [1, 0]
    assert drawn(accept_greedy([1, 0, 3], [1, 0], make_sequence())) == [1, 0, 3]
