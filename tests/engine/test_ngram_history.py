"""What a text is copied from is found, followed, and given up when it goes another way."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.engine.ngram_history import NgramHistory


def guess_of(history: NgramHistory, count: int) -> list[int]:
    """The tokens that come next where each guess comes true."""
    mark, found = history.mark(), []
    while len(found) < count and (token_id := history.following) is not None:
        found.append(token_id)
        history.foresee(token_id)
    history.back(mark)
    return found


tokens = st.lists(st.integers(0, 4), max_size=60)


def history_of(*token_ids: int) -> NgramHistory:
    history = NgramHistory()
    history.prime(token_ids)
    return history


def test_guess_is_what_followed_the_same_tokens() -> None:
    history = history_of(1, 2, 3, 4, 5, 9, 2, 3)
    assert (history.matched, guess_of(history, 3)) == (2, [4, 5, 9])


def test_longest_match_wins_over_the_latest() -> None:
    history = history_of(7, 1, 2, 30, 8, 1, 2, 40, 7, 1, 2)
    assert (history.matched, guess_of(history, 1)) == (3, [30])


def test_latest_wins_among_equals() -> None:
    assert guess_of(history_of(7, 1, 2, 30, 8, 1, 2, 40, 9, 1, 2), 1) == [40]


def test_a_copy_goes_on_past_its_own_end() -> None:
    assert guess_of(history_of(5, 6, 5, 6), 5) == [5, 6, 5, 6, 5]
    assert guess_of(history_of(8, 8, 8), 4) == [8, 8, 8, 8]


def test_nothing_is_guessed_after_a_token_not_seen_before() -> None:
    for token_ids in ((), (1,), (1, 2), (1, 2, 3, 4)):
        assert guess_of(history_of(*token_ids), 4) == []


def test_what_is_followed_goes_on_while_it_comes_true() -> None:
    history = history_of(1, 2, 3, 4, 5, 1, 2)
    assert (history.following, history.matched) == (3, 2)
    history.append(3)
    history.append(4)
    assert (history.following, history.matched) == (5, 4)
    history.append(9)
    assert (history.following, history.matched) == (None, 0)


def test_what_is_foreseen_leaves_no_trace() -> None:
    history, twin = history_of(1, 2, 3, 4, 5, 1, 2), history_of(1, 2, 3, 4, 5, 1, 2)
    mark = history.mark()
    for token_id in (3, 4, 9, 2, 3, 4):
        history.foresee(token_id)
    assert history.following == 5
    history.back(mark)
    for token_id in (9, 4, 5, 9, 3):
        assert (history.following, history.matched, len(history)) == (twin.following, twin.matched, len(twin))
        history.append(token_id)
        twin.append(token_id)


def test_a_better_match_replaces_the_one_that_is_followed() -> None:
    # 1 2 leads to the latest place; once 3 4 have come, the earlier place matches more.
    history = history_of(6, 1, 2, 3, 50, 7, 1, 2, 3, 60, 8, 6, 1, 2)
    assert guess_of(history, 2) == [3, 50]
    history = history_of(1, 2, 3, 50, 7, 1, 2, 3, 60, 8, 1, 2)
    history.append(3)
    assert guess_of(history, 1) == [60]


@given(tokens, tokens)
@settings(max_examples=200, deadline=None)
def test_matched_tokens_precede_the_guess_and_the_end_alike(prompt: list[int], answer: list[int]) -> None:
    history = history_of(*prompt)
    for token_id in answer:
        history.append(token_id)
    text = [*prompt, *answer]
    assert len(history) == len(text)
    assert (history.following is not None) == (history.matched > 0) == (text[-1:] != [] and text[-1] in text[:-1])
    matched = min(history.matched, len(text) - 1)
    # Overlapping copies count.
    places = [place for place in range(matched, len(text)) if text[place - matched : place] == text[-matched:]]
    assert history.following is None or history.following in [text[place] for place in places]
