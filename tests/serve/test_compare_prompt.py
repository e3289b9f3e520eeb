"""What is asked of all models, and that a link carries all of it."""

from __future__ import annotations

from urllib.parse import parse_qsl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.errors import RequestError
from burnish.serve.compare_prompt import Asked, asked_of, from_query, to_query
from burnish.serve.compare_samples import NUM_SAMPLES, samples


def back(asked: Asked) -> Asked:
    found, complaints = from_query(dict(parse_qsl(to_query(asked), keep_blank_values=True)))
    assert not complaints
    return found


@given(
    question=st.text(max_size=80),
    context=st.text(max_size=80),
    max_tokens=st.integers(1, 4096),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, 2**31 - 1),
    in_turn=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_link_carries_prompt_and_settings(**given_fields: object) -> None:
    asked = Asked(**given_fields)  # type: ignore[arg-type]
    assert back(asked) == asked


def test_an_example_is_named_and_not_written_out() -> None:
    asked = asked_of(samples()[7])
    assert to_query(asked) == "example=7"
    assert back(asked) == asked
    changed = Asked(question="How many?", context=asked.context, sample=7)
    assert to_query(changed) == "q=How+many%3F&example=7"
    assert back(changed) == changed
    emptied = Asked(question="", context=asked.context, sample=7)
    assert back(emptied) == emptied


def test_other_tables_leave_the_example() -> None:
    asked = Asked(question="a", context="CREATE TABLE mine (id INTEGER);", sample=7)
    assert asked.of_sample is None
    assert asked.reference is None
    assert asked.database == asked.context
    assert "example" not in to_query(asked)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"tokens": "many"}, "tokens is no number"),
        ({"tokens": "0"}, "tokens is out of range"),
        ({"tokens": "1.5"}, "tokens is no number"),
        ({"temperature": "nan"}, "temperature is no number"),
        ({"temperature": "3"}, "temperature is out of range"),
        ({"top_p": "0"}, "top_p is out of range"),
        ({"seed": "-1"}, "seed is out of range"),
        ({"example": str(NUM_SAMPLES)}, "example is out of range"),
        ({"in_turn": "yes"}, "in_turn is out of range"),
        ({"q": "x" * 20_001}, "question is not usable"),
    ],
)
def test_what_a_link_says_wrong_is_told_and_left_out(query: dict[str, str], said: str) -> None:
    asked, complaints = from_query({"utm_source": "x", **query})
    assert asked == Asked()
    assert len(complaints) == 1
    assert said in complaints[0]


def test_a_key_that_is_no_setting_is_told() -> None:
    asked, complaints = from_query({"foo": "1", "q": "a", "__theme": "dark", "utm_source": "x"})
    assert asked == Asked(question="a")
    assert complaints == ["The link's 'foo' is no setting of this page"]


def test_a_prompt_too_long_for_a_link_is_refused() -> None:
    with pytest.raises(RequestError, match="too long for a link"):
        to_query(Asked(question="ä" * 5_000))


def test_half_a_character_is_refused() -> None:
    with pytest.raises(RequestError, match="no valid Unicode"):
        Asked(question="\ud83d")


def test_the_database_is_the_examples_only_while_its_tables_stand() -> None:
    sample = samples()[0]
    asked = asked_of(sample)
    assert asked.database == sample.database
    assert asked.reference is sample
    assert Asked(question="other", context=sample.context, sample=0).reference is None
    assert Asked(question="Hello").database is None
