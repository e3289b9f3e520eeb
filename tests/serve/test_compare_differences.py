"""Marking where answers differ."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.serve.compare_differences import Segment, mark_differences, share_enough

ANSWERS = st.lists(st.one_of(st.none(), st.text(alphabet="ab c,\n(1", max_size=40)), min_size=1, max_size=4)


def marked(segments: list[Segment]) -> list[str]:
    return [segment.text.strip() for segment in segments if segment.differs]


def test_words_that_differ_are_marked_on_both_sides() -> None:
    one, two = mark_differences(
        ["SELECT name FROM zoo WHERE fee > 3 ORDER BY name", "SELECT name, fee FROM zoo WHERE fee >= 3 ORDER BY name"]
    )
    assert marked(one) == []
    assert marked(two) == [", fee", "="]
    one, two = mark_differences(["SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b = 2"])
    assert (marked(one), marked(two)) == (["1"], ["2"])


def test_equal_answers_have_no_marks() -> None:
    assert [marked(each) for each in mark_differences(["SELECT 1", "SELECT 1"])] == [[], []]


def test_the_first_is_marked_where_any_other_differs() -> None:
    first, *_ = mark_differences(["a b c d e f", "a b c d e g", "z b c d e f"])
    assert marked(first) == ["a", "f"]


def test_answers_with_hardly_anything_in_common_are_not_marked() -> None:
    texts = ["What are the trails of parks?", "SELECT biome FROM park ORDER BY trails"]
    assert not share_enough(*texts)
    assert [marked(each) for each in mark_differences(texts)] == [[], []]


def test_a_missing_answer_leaves_the_others() -> None:
    assert mark_differences([None, "a"]) == [[], [Segment("a", False)]]
    assert mark_differences(["a", None]) == [[Segment("a", False)], []]
    assert mark_differences([]) == []


@given(ANSWERS)
@settings(max_examples=150, deadline=None)
def test_the_pieces_are_the_answer(answers: list[str | None]) -> None:
    for text, segments in zip(answers, mark_differences(answers)):
        assert "".join(segment.text for segment in segments) == (text or "")
        assert not any(segment.differs and segment.text.isspace() for segment in segments)


def test_a_long_answer_is_compared_by_its_beginning() -> None:
    long = "word " * 3_000
    segments = mark_differences([long, "other " + long])
    assert "".join(segment.text for segment in segments[1]) == "other " + long
    assert marked(segments[1]) == ["other"]
