"""Penalties equal transformers' (repetition) and OpenAI's published formula (presence, frequency)."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from burnish.engine.penalties import TokenCounts, apply_penalties
from burnish.engine.sampling import SamplingParams

VOCAB = 23
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=150)


@given(
    rows=st.lists(
        st.tuples(TOKENS.filter(bool), TOKENS, st.floats(0.3, 3), st.floats(-2, 2), st.floats(-2, 2)),
        min_size=1,
        max_size=4,
    )
)
def test_penalties_equal_their_formulas(rows: list[tuple[list[int], list[int], float, float, float]]) -> None:
    logits_BV = torch.randn((len(rows) + 1, VOCAB), generator=torch.Generator().manual_seed(len(rows)))
    expected_BV = logits_BV.clone()
    asked = []
    for row, (prompt, answer, repetition, presence, frequency) in enumerate(rows):
        processor = RepetitionPenaltyLogitsProcessor(repetition)
        seen: torch.Tensor = torch.tensor([prompt + answer])
        expected_V = processor(seen, expected_BV[row : row + 1].clone())[0]  # type: ignore[arg-type]
        for token in range(VOCAB):
            count = answer.count(token)
            # mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
            expected_V[token] -= count * frequency + float(count > 0) * presence
        expected_BV[row] = expected_V
        counts = TokenCounts(prompt)
        counts.follow(answer)
        params = SamplingParams(repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
        asked.append((row, params, counts))
    apply_penalties(logits_BV, asked)
    torch.testing.assert_close(logits_BV, expected_BV, rtol=1e-5, atol=1e-5)


@given(prompt=TOKENS, answers=st.lists(TOKENS, min_size=1, max_size=5))
def test_counts_follow_any_answer(prompt: list[int], answers: list[list[int]]) -> None:
    counts = TokenCounts(prompt)
    for answer in answers:
        for length in (len(answer) // 2, len(answer)):
            counts.follow(answer[:length])
            found = dict(zip(counts.ids_N.tolist(), counts.counts_N.tolist()))
            assert found == {token: answer[:length].count(token) for token in {*prompt, *answer[:length]}}


def test_counts_grow_with_a_long_answer() -> None:
    counts = TokenCounts([5, 5])
    answer: list[int] = []
    for token in range(1000):
        answer += [token, token]
        counts.follow(answer)
    assert dict(zip(counts.ids_N.tolist(), counts.counts_N.tolist())) == dict.fromkeys(range(1000), 2.0)
    assert counts.ids_N[0] == 5


def test_no_rows_change_nothing() -> None:
    logits_BV = torch.ones((2, 3))
    apply_penalties(logits_BV, [])
    assert logits_BV.tolist() == [[1.0] * 3] * 2
