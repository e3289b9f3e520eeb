"""What a text is copied from is found, followed, and given up when it goes another way."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.engine.ngram_history import NgramHistory

tokens = st.lists(st.integers(0, 4), max_size=60)


def history_of(*token_ids: int) -> NgramHistory:
    history = NgramHistory()
    history.prime(token_ids)
    return history


def test_guess_is_what_followed_the_same_tokens() -> None:
    history = history_of(1, 2, 3, 4, 5, 9, 2, 3)
    assert (history.matched, history.guess(3)) == (2, [4, 5, 9])


def test_longest_match_wins_over_the_latest() -> None:
    history = history_of(7, 1, 2, 30, 8, 1, 2, 40, 7, 1, 2)
    assert (history.matched, history.guess(1)) == (3, [30])


def test_latest_wins_among_equals() -> None:
    assert history_of(7, 1, 2, 30, 8, 1, 2, 40, 9, 1, 2).guess(1) == [40]


def test_a_copy_goes_on_past_its_own_end() -> None:
    assert history_of(5, 6, 5, 6).guess(5) == [5, 6, 5, 6, 5]
    assert history_of(8, 8, 8).guess(4) == [8, 8, 8, 8]


def test_nothing_is_guessed_without_a_pair_seen_before() -> None:
    for token_ids in ((), (1,), (1, 2), (1, 2, 3, 1), (1, 2, 3, 4)):
        assert history_of(*token_ids).guess(4) == []


def test_outcomes_tell_what_was_foreseen() -> None:
    history = history_of(1, 2, 3, 4, 5, 1, 2)
    assert history.extend([3, 4]) == [(2, True), (3, True)]
    assert history.matched == 4
    assert history.extend([9, 9]) == [(4, False)]
    assert history.guess(2) == []


def test_a_better_match_replaces_the_one_that_is_followed() -> None:
    # 1 2 leads to the latest place; once 3 4 have come, the earlier place matches more.
    history = history_of(6, 1, 2, 3, 50, 7, 1, 2, 3, 60, 8, 6, 1, 2)
    assert history.guess(2) == [3, 50]
    history = history_of(1, 2, 3, 50, 7, 1, 2, 3, 60, 8, 1, 2)
    assert history.extend([3]) == [(2, True)]
    assert history.guess(1) == [60]


@given(tokens, tokens)
@settings(max_examples=200, deadline=None)
def test_matched_tokens_precede_the_guess_and_the_end_alike(prompt: list[int], answer: list[int]) -> None:
    history = history_of(*prompt)
    history.extend(answer)
    text = [*prompt, *answer]
    guess = history.guess(3)
    assert len(history) == len(text)
    assert bool(guess) == (history.matched > 0)
    pairs = list(itertools.pairwise(text))
    assert bool(guess) == (len(text) > 2 and pairs[-1] in pairs[:-1])
    if guess:
        # Overlapping copies count: the guess follows some earlier place with so many tokens before it.
        longer = [*text, *guess]
        matched = min(history.matched, len(text) - 1)
        places = [
            place
            for place in range(matched, len(text))
            if text[place - matched : place] == text[len(text) - matched :]
            and longer[place : place + len(guess)] == guess
        ]
        assert places


@given(st.lists(tokens, max_size=6))
@settings(max_examples=100, deadline=None)
def test_pieces_do_not_matter(pieces: list[list[int]]) -> None:
    whole, parts = NgramHistory(), NgramHistory()
    outcomes = whole.extend([token_id for piece in pieces for token_id in piece])
    assert [outcome for piece in pieces for outcome in parts.extend(piece)] == outcomes
    assert parts.guess(5) == whole.guess(5)
