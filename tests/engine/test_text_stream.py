"""Text that has been shown is never taken back, and no part of a stop string is shown."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from burnish.engine.text_stream import TextStream


class Pieces:
    """Token i is piece i."""

    def __init__(self, pieces: list[str], held: str = "") -> None:
        self.pieces, self.held = pieces, held

    def push(self, token_id: int, /) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return self.held


def play(
    pieces: list[str], stop: list[str], *, held: str = "", quiet: int = 0, include_stop: bool = False
) -> tuple[list[str], str, bool]:
    """Pieces shown after each token, the final text, and whether a stop string ended it."""
    stream = TextStream(Pieces(pieces, held), stop, include_stop=include_stop)
    shown: list[str] = []
    stopped = False
    for token_id in range(len(pieces)):
        stopped = stream.push(token_id, may_stop=token_id >= quiet)
        shown.append(stream.take())
        if stopped:
            break
    stopped = stream.finish() or stopped
    shown.append(stream.take())
    return shown, stream.text, stopped


def test_text_without_stop_is_shown_at_once() -> None:
    assert play(["a", "b"], []) == (["a", "b", ""], "ab", False)


def test_stop_across_pieces_is_cut_and_never_shown() -> None:
    assert play(["one <", "/", "s", "> two"], ["</s>"]) == (["one ", "", "", "", ""], "one ", True)


def test_false_start_of_a_stop_is_shown_late() -> None:
    assert play(["x<", "/", "p>"], ["</s>"]) == (["x", "", "</p>", ""], "x</p>", False)


def test_first_of_several_stops_counts() -> None:
    assert play(["abcd"], ["cd", "b"])[1:] == ("a", True)


def test_stop_completed_by_the_flush_counts() -> None:
    assert play(["ab"], ["bc"], held="c")[1:] == ("a", True)


def test_stop_before_min_tokens_is_plain_text() -> None:
    assert play(["END", " EN", "D!"], ["END"], quiet=1) == (["END", " ", "", ""], "END ", True)
    assert play(["EN", "D!"], ["END"], quiet=1)[1:] == ("END!", False)


@given(
    pieces=st.lists(st.text("ab.", max_size=3), max_size=12),
    stop=st.lists(st.text("ab.", min_size=1, max_size=3), max_size=3),
    held=st.text("ab", max_size=2),
)
def test_shown_pieces_join_to_the_text_cut_at_the_first_stop(pieces: list[str], stop: list[str], held: str) -> None:
    shown, text, stopped = play(pieces, stop, held=held)
    assert "".join(shown) == text
    assert not any(one in text for one in stop)
    whole = "".join(pieces) + held
    assert whole.startswith(text)
    assert stopped == any(one in whole for one in stop)
    if not stopped:
        assert text == whole


def test_stop_string_stays_in_the_text_when_asked() -> None:
    assert play(["one <", "/", "s", "> two"], ["</s>"], include_stop=True) == (
        ["one ", "", "", "</s>", ""],
        "one </s>",
        True,
    )


def test_of_two_stops_at_one_place_the_one_complete_first_counts() -> None:
    assert play(["xab", "c"], ["abc", "ab"], include_stop=True)[1:] == ("xab", True)
    assert play(["xabc"], ["abc", "ab"], include_stop=True)[1:] == ("xab", True)


def test_stop_that_repeats_its_own_beginning_is_found() -> None:
    assert play(["a", "a", "a", "b", "!"], ["aab"])[1:] == ("a", True)


@given(text=st.text("ab", max_size=14), stop=st.text("ab", min_size=1, max_size=5), data=st.data())
def test_cutting_the_text_into_pieces_changes_nothing(text: str, stop: str, data: st.DataObject) -> None:
    """Wherever the tokens' edges are, the text ends with the first stop string, or before it."""
    edges = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=6))})
    pieces = [text[begin:end] for begin, end in itertools.pairwise(edges)]
    before, found, _ = text.partition(stop)
    assert play(pieces, [stop])[1:] == (before, bool(found))
    shown, kept, stopped = play(pieces, [stop], include_stop=True)
    assert (kept, stopped) == (before + found, bool(found))
    assert "".join(shown) == kept


@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=10),
    stop=st.text("ab", min_size=1, max_size=4),
    quiet=st.integers(0, 10),
)
def test_stop_in_the_quiet_part_is_plain_text(pieces: list[str], stop: str, quiet: int) -> None:
    """What arrived before min_tokens never counts, not even as the beginning of a later match."""
    free = "".join(pieces[:quiet])
    _, text, stopped = play(pieces, [stop], quiet=quiet)
    before, found, _ = "".join(pieces[quiet:]).partition(stop)
    assert (text, stopped) == (free + before, bool(found))
