"""Drafts are made where copies come true and a few rows more cost little, and not where either fails."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from burnish.engine.drafter import make_drafter
from burnish.engine.ngram_drafter import NgramDrafter
from burnish.engine.sequence import Sequence
from burnish.errors import ConfigError

MakeSequence = Callable[..., Sequence]


def memory_bound(num_rows: int) -> float:
    return 0.020 if num_rows <= 7 else 0.006 * num_rows


def compute_bound(num_rows: int) -> float:
    return 0.002 * num_rows


class Run:
    """Sequences that go on as told, step by step, under a clock of our own."""

    def __init__(self, drafter: NgramDrafter, cost: Callable[[int], float]) -> None:
        self.drafter, self.cost = drafter, cost
        self.seconds = 0.0
        self.lengths: list[int] = []

    def step(self, *rows: tuple[Sequence, list[int]]) -> None:
        """Each sequence with the answer that it is going to give."""
        sequences = [sequence for sequence, _ in rows]
        self.drafter.draft(sequences)
        num_rows = sum(1 + len(sequence.drafts) for sequence in sequences)
        self.lengths.append(num_rows - len(sequences))
        for sequence, answer in rows:
            begin = len(sequence.token_ids)
            count = 1
            while count <= len(sequence.drafts) and sequence.drafts[count - 1] == answer[begin + count - 1]:
                count += 1
            sequence.token_ids += answer[begin : begin + count]
            sequence.drafts.clear()
        self.seconds += self.cost(num_rows)
        self.drafter.observe(num_rows, self.cost(num_rows))

    def whole(self, sequence: Sequence, answer: list[int]) -> None:
        while len(sequence.token_ids) < len(answer) - 9:
            self.step((sequence, answer))


def noise(seed: int, count: int, vocabulary: int = 5000) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(vocabulary) for _ in range(count)]


def test_copies_are_drafted_and_save_time(make_sequence: MakeSequence) -> None:
    text = noise(1, 200)
    run = Run(NgramDrafter(), memory_bound)
    run.whole(make_sequence(text, max_tokens=400), [*text[50:150], *text[20:120]])
    assert run.seconds < 200 * memory_bound(1) / 3
    assert set(run.lengths[-12:-2]) == {6}, "the seventh row is the last that costs nothing"


def test_text_without_copies_is_not_drafted(make_sequence: MakeSequence) -> None:
    run = Run(NgramDrafter(), memory_bound)
    run.whole(make_sequence(noise(1, 200), max_tokens=400), noise(2, 300))
    assert sum(run.lengths) < 0.1 * len(run.lengths)


def test_copies_that_do_not_come_true_are_given_up(make_sequence: MakeSequence) -> None:
    # Few distinct tokens: every pair was seen, and what follows it is a matter of chance.
    run = Run(NgramDrafter(), lambda rows: 0.02 * (1 + 0.2 * (rows - 1)))
    run.whole(make_sequence(noise(1, 300, 12), max_tokens=900), noise(2, 600, 12))
    assert sum(run.lengths[-200:]) < 40
    assert run.seconds < 1.1 * 600 * 0.02


def test_copies_are_left_alone_where_rows_cost_as_much_as_steps(make_sequence: MakeSequence) -> None:
    text = noise(1, 200)
    run = Run(NgramDrafter(), compute_bound)
    answer = [*text[20:180]] * 4
    run.whole(make_sequence(text, max_tokens=900), answer)
    assert run.seconds < 1.1 * len(answer) * compute_bound(1)
    assert sum(length > 0 for length in run.lengths[50:]) < 0.06 * len(run.lengths)


def test_it_comes_back_when_rows_become_cheap(make_sequence: MakeSequence) -> None:
    text = noise(1, 400)
    run = Run(NgramDrafter(), compute_bound)
    answer = [*text[20:380]] * 6
    sequence = make_sequence(text, max_tokens=4000)
    while len(sequence.token_ids) < 400:
        run.step((sequence, answer))
    run.cost = memory_bound
    run.whole(sequence, answer)
    assert min(run.lengths[-40:-2]) >= 4


def test_one_slow_step_does_not_turn_it_off(make_sequence: MakeSequence) -> None:
    text = noise(1, 400)
    run = Run(NgramDrafter(), memory_bound)
    sequence, answer = make_sequence(text, max_tokens=1000), [*text[10:390]] * 2
    while len(sequence.token_ids) < 200:
        run.step((sequence, answer))
    run.cost = lambda rows: 3.0
    run.step((sequence, answer))
    run.cost = memory_bound
    run.whole(sequence, answer)
    assert min(run.lengths[-30:-2]) >= 5


def test_a_sure_sequence_gets_the_rows_before_an_unsure_one(make_sequence: MakeSequence) -> None:
    text = noise(1, 300)
    sure, unsure = make_sequence(text, max_tokens=400), make_sequence(noise(3, 300, 12), max_tokens=400)
    copy, chance = [*text[20:280]], noise(4, 400, 12)
    run = Run(NgramDrafter(), memory_bound)
    drafted = [0, 0]
    for _ in range(30):
        run.drafter.draft([sure, unsure])
        drafted = [drafted[0] + len(sure.drafts), drafted[1] + len(unsure.drafts)]
        run.step((sure, copy), (unsure, chance))
    assert drafted[0] > 3 * drafted[1]


def test_drafts_never_reach_past_the_longest_answer(make_sequence: MakeSequence) -> None:
    sequence = make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], answer=[3], max_tokens=4)
    NgramDrafter().draft([sequence])
    assert sequence.drafts == [4, 5]
    sequence.token_ids += [4, 5]
    sequence.drafts.clear()
    NgramDrafter().draft([sequence])
    assert sequence.drafts == []


def test_many_sequences_are_drafted_for_when_asked_only(make_sequence: MakeSequence) -> None:
    for speculation, count, drafts in (("auto", 4, True), ("auto", 5, False), ("ngram", 5, True)):
        drafter: Any = make_drafter(speculation, kv_cache=True)
        sequences = [make_sequence([1, 2, 3, 4, 1, 2], answer=[3]) for _ in range(count)]
        drafter.draft(sequences)
        assert any(sequence.drafts for sequence in sequences) == drafts


def test_what_answers_share_is_guessed_once_some_were_seen(make_sequence: MakeSequence) -> None:
    phrase = noise(7, 20)
    steps = []
    run = Run(NgramDrafter(), memory_bound)
    for number in range(30):
        # Nothing of the answer stands in the prompt; every fifth token is its own.
        own = noise(100 + number, 8)
        answer = [token for place in range(4) for token in (*phrase[5 * place : 5 * place + 4], own[place])]
        before = len(run.lengths)
        run.whole(make_sequence(noise(200 + number, 50), max_tokens=21), [*answer, *answer[:9]])
        steps.append(len(run.lengths) - before)
    assert steps[0] > 18
    assert max(steps[-5:]) <= 8


def test_each_adapter_has_a_memory_of_its_own(make_sequence: MakeSequence) -> None:
    drafter = NgramDrafter()
    answer = noise(7, 30)
    for adapter, guessed in ((1, False), (2, False), (1, True)):
        sequence = make_sequence(noise(adapter, 40), max_tokens=60)
        sequence.adapter_number = adapter
        sequence.token_ids += answer[:10]
        drafter.draft([sequence])
        assert bool(sequence.drafts) == guessed
        sequence.token_ids += answer[10:]
        drafter.draft([sequence])


def test_a_sequence_that_is_gone_is_forgotten(make_sequence: MakeSequence) -> None:
    drafter = NgramDrafter()
    for _ in range(3):
        drafter.draft([make_sequence([1, 2, 3, 1, 2])])
    assert len(drafter._following) <= 1


@pytest.mark.parametrize(("speculation", "kv_cache", "made"), [("off", True, False), ("auto", False, False)])
def test_nobody_guesses(speculation: str, kv_cache: bool, made: bool) -> None:
    assert (make_drafter(speculation, kv_cache=kv_cache) is not None) == made


def test_bad_ways_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown speculation"):
        make_drafter("model", kv_cache=True)
    with pytest.raises(ConfigError, match="needs the KV cache"):
        make_drafter("ngram", kv_cache=False)
