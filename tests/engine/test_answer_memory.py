"""What came most often after the last tokens is told, the longest known context first, in bounded memory."""

from __future__ import annotations

import random

from burnish.engine.answer_memory import AnswerMemory


def taught(*answers: list[int], generation: int = 1000) -> AnswerMemory:
    memory = AnswerMemory(generation=generation)
    for answer in answers:
        for place, token_id in enumerate(answer):
            memory.learn(answer[:place], token_id)
    return memory


def test_nothing_is_known_at_first() -> None:
    assert AnswerMemory().guess([1, 2, 3]) is None
    assert taught([1, 2]).guess([]) is None


def test_longer_contexts_decide() -> None:
    memory = taught(*[[1, 5, 7], [2, 5, 8], [3, 5, 8]] * 3)
    assert memory.guess([1, 5]) == (7, 2, 3 / 4)
    assert memory.guess([2, 5]) == (8, 2, 3 / 4)
    token_id, order, share = memory.guess([9, 5]) or (0, 0, 0.0)
    assert (token_id, order) == (8, 1)
    assert 0.5 < share < 0.7


def test_a_context_seen_once_is_asked_only_where_no_other_is_known() -> None:
    assert taught([1, 2, 3]).guess([1, 2]) == (3, 1, 1 / 2)
    assert (taught([9, 2, 4], [8, 2, 4], [1, 2, 3]).guess([1, 2]) or ())[:2] == (4, 1)


def test_what_comes_lately_replaces_what_came_before() -> None:
    memory = taught(*[[1, 2]] * 200, *[[1, 3]] * 200)
    token_id, _, share = memory.guess([1]) or (0, 0, 0.0)
    assert token_id == 3
    assert share > 0.5


def test_memory_is_bounded_and_keeps_what_is_met_again() -> None:
    source = random.Random(0)
    memory, known = AnswerMemory(generation=100), [3, 4, 5]
    for _ in range(200):
        for answer in (known, [source.randrange(10_000) for _ in range(5)]):
            for place, token_id in enumerate(answer):
                memory.learn(answer[:place], token_id)
        assert len(memory) <= 200
    assert (memory.guess([3, 4]) or ())[:2] == (5, 2)
