"""Room is taken and given back exactly, whatever comes in which order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.serve.admission import Admission, Busy, answers


def test_full_queue_turns_away_and_says_when_to_come_back() -> None:
    room = Admission(max_running=2, max_queue=1)
    for _ in range(3):
        room.enter(1, ready=True)
    with pytest.raises(Busy) as busy:
        room.enter(1, ready=True)
    assert busy.value.reason == "full"
    assert 1 <= busy.value.retry_after_s <= 60
    room.leave(1)
    room.enter(1, ready=True)
    assert room.held == 3


def test_a_look_takes_no_room_and_fails_where_none_is() -> None:
    room = Admission(max_running=1, max_queue=0)
    room.enter(0, ready=True)
    assert room.held == 0
    room.enter(1, ready=True)
    with pytest.raises(Busy):
        room.enter(0, ready=True)


def test_nobody_enters_while_draining_or_without_an_engine() -> None:
    room = Admission(max_running=1, max_queue=1)
    with pytest.raises(Busy) as busy:
        room.enter(1, ready=False)
    assert busy.value.reason == "not_ready"
    room.draining = True
    with pytest.raises(Busy) as busy:
        room.enter(1, ready=True)
    assert busy.value.reason == "draining"
    assert room.held == 0


def test_a_request_larger_than_all_room_runs_alone() -> None:
    room = Admission(max_running=1, max_queue=1)
    room.enter(10, ready=True)
    with pytest.raises(Busy):
        room.enter(1, ready=True)
    room.leave(10)
    room.enter(1, ready=True)


@given(st.lists(st.integers(min_value=-4, max_value=4)))
def test_what_is_held_is_what_entered_less_what_left(steps: list[int]) -> None:
    room = Admission(max_running=4, max_queue=4)
    held = 0
    for step in steps:
        if step < 0:
            count = min(-step, held)
            room.leave(count)
            held -= count
            continue
        try:
            room.enter(step, ready=True)
        except Busy:
            assert held + max(step, 1) > 8
        else:
            held += step
            assert held <= 8
        assert room.held == held


def test_one_answer_is_told_as_one() -> None:
    assert [answers(count) for count in (0, 1, 2)] == ["0 answers", "1 answer", "2 answers"]
