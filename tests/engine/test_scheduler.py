"""Whatever comes and goes, blocks are conserved, nobody starves, and the cache holds what a sequence believes."""

from __future__ import annotations

import random

import pytest
from fake_cache import FakeCache, answer_token, make_sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.engine.block_manager import BlockManager
from burnish.engine.logprobs import PromptLogprobs
from burnish.engine.rope_lengths import RopeLengths
from burnish.engine.scheduler import Batch, Scheduler
from burnish.engine.sequence import Sequence
from burnish.errors import RequestError


def make_scheduler(
    num_blocks: int = 50,
    *,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_batch_tokens: int = 32,
    window: int | None = None,
    prefix_caching: bool = True,
    rope: RopeLengths | None = None,
) -> Scheduler:
    return Scheduler(
        blocks=BlockManager(num_blocks, block_size=block_size, window=window, prefix_caching=prefix_caching),
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        rope=rope,
        block_bytes=1 << 20,
    )


def shape(batch: Batch | None) -> list[tuple[int, int, int]]:
    return [] if batch is None else [(row.sequence.request_id, row.start, row.end) for row in batch.rows]


def finish(cache: FakeCache) -> int:
    """Run until nothing is left; returns steps."""
    steps = 0
    while not cache.scheduler.idle:
        assert cache.step() is not None, "nothing runs though something waits"
        cache.scheduler.check_integrity()
        steps += 1
        assert steps < 5000, "a sequence starves"
    assert cache.scheduler.blocks is None or cache.scheduler.blocks.num_used == 0
    return steps


def expected_answer(sequence: Sequence) -> list[int]:
    tokens = list(sequence.prompt_ids)
    for _ in range(sequence.max_tokens):
        tokens.append(answer_token(tokens))
    return tokens[len(sequence.prompt_ids) :]


def test_prompts_join_decoding_sequences_within_the_budget() -> None:
    scheduler = make_scheduler(max_batch_tokens=8)
    cache = FakeCache(scheduler)
    scheduler.add(make_sequence(0, [1, 2, 3], max_tokens=9))
    scheduler.add(make_sequence(1, list(range(10, 22)), max_tokens=2))
    scheduler.add(make_sequence(2, [7, 8], max_tokens=2))
    seen = [shape(cache.step()) for _ in range(4)]
    assert seen[0] == [(0, 0, 3), (1, 0, 5)]
    assert seen[1] == [(0, 3, 4), (1, 5, 12)]
    assert seen[2] == [(0, 4, 5), (1, 12, 13), (2, 0, 2)]
    assert seen[3] == [(0, 5, 6), (2, 2, 3)]


def test_first_come_is_first_served_even_when_a_later_one_would_fit() -> None:
    scheduler = make_scheduler(6, max_batch_tokens=100)
    cache = FakeCache(scheduler)
    for request_id, length in enumerate([12, 16, 2]):
        scheduler.add(make_sequence(request_id, [request_id * 100 + place for place in range(length)], max_tokens=2))
    assert shape(cache.step()) == [(0, 0, 12)]
    assert [one.request_id for one in scheduler.waiting] == [1, 2]
    finish(cache)


def test_youngest_is_preempted_and_keeps_its_tokens() -> None:
    scheduler = make_scheduler(8, prefix_caching=False)
    cache = FakeCache(scheduler)
    sequences = [make_sequence(index, [index + 1] * 8, max_tokens=20) for index in range(2)]
    for sequence in sequences:
        scheduler.add(sequence)
    finish(cache)
    assert scheduler.num_preemptions > 0
    assert sequences[0].num_preemptions == 0
    assert [sequence.token_ids for sequence in sequences] == [expected_answer(one) for one in sequences]


def test_equal_prompts_are_computed_once_even_when_they_come_together() -> None:
    scheduler = make_scheduler(max_batch_tokens=100)
    cache = FakeCache(scheduler)
    sequences = [make_sequence(index, list(range(21)), max_tokens=3) for index in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    other = make_sequence(9, [50] * 5)
    scheduler.add(other)
    assert shape(cache.step()) == [(0, 0, 21), (9, 0, 5)]
    assert shape(cache.step())[2:] == [(1, 20, 21), (2, 20, 21), (3, 20, 21)]
    assert scheduler.prefix_hit_tokens == 60
    finish(cache)


def test_adapters_do_not_share_blocks() -> None:
    scheduler = make_scheduler()
    cache = FakeCache(scheduler)
    for index in range(2):
        scheduler.add(make_sequence(index, list(range(12)), adapter_number=index))
    finish(cache)
    assert scheduler.prefix_hit_tokens == 0


def test_prompt_larger_than_all_blocks_is_refused_with_what_it_needs() -> None:
    scheduler = make_scheduler(5)
    with pytest.raises(RequestError, match=r"21 tokens, which need 6\.0 MiB.*at most 19 tokens.*5\.0 MiB"):
        scheduler.add(make_sequence(0, [1] * 21))
    assert scheduler.idle


def test_answer_ends_where_the_blocks_end() -> None:
    scheduler = make_scheduler(5)
    sequence = make_sequence(0, [1] * 15, max_tokens=100)
    scheduler.add(sequence)
    finish(FakeCache(scheduler))
    assert (len(sequence.token_ids), sequence.finish_reason) == (5, "length")


def test_window_lets_a_long_sequence_run_in_few_blocks() -> None:
    scheduler = make_scheduler(6, window=6, max_batch_tokens=8)
    cache = FakeCache(scheduler)
    sequence = make_sequence(0, list(range(100)), max_tokens=60)
    scheduler.add(sequence)
    finish(cache)
    assert len(sequence.token_ids) == 60
    assert cache.most_used <= 5
    assert scheduler.num_preemptions == 0


def test_accepted_drafts_save_steps_and_change_nothing() -> None:
    lengths = []
    for good in (False, True):
        scheduler = make_scheduler()
        cache = FakeCache(scheduler)
        sequence = make_sequence(0, [1, 2, 3], max_tokens=40)
        scheduler.add(sequence)
        steps = 0
        while not scheduler.idle:
            if sequence.num_uncomputed == 1:
                right = expected_answer(sequence)[len(sequence.token_ids) :]
                sequence.drafts = right[:4] if good else [9, *right[:3]]
            batch = cache.step()
            scheduler.check_integrity()
            steps += 1
        assert batch is not None
        assert sequence.token_ids == expected_answer(sequence)
        lengths.append(steps)
    assert lengths == [40, 9]


def test_drafts_yield_to_blocks_and_budget() -> None:
    scheduler = make_scheduler(4, max_batch_tokens=6)
    cache = FakeCache(scheduler)
    sequences = [make_sequence(index, [index + 1] * 3, max_tokens=5) for index in range(2)]
    for sequence in sequences:
        scheduler.add(sequence)
    cache.step()
    for sequence in sequences:
        sequence.drafts = [5] * 9
    batch = cache.step()
    assert batch is not None
    # Four tokens are left to produce, so that three drafts can be right; the second row gets what the budget leaves.
    assert [len(row.drafts) for row in batch.rows] == [3, 1]
    finish(cache)
    assert scheduler.num_preemptions == 0


def test_prompt_that_is_scored_needs_all_its_logits_once() -> None:
    scheduler = Scheduler(
        blocks=BlockManager(50, block_size=4), max_num_seqs=2, max_batch_tokens=16, max_scored_tokens=6
    )
    plain, scored = make_sequence(0, list(range(9)), max_tokens=1), make_sequence(1, list(range(9)), max_tokens=3)
    scheduler.add(plain)
    finish(FakeCache(scheduler))
    scored.prompt_logprobs = PromptLogprobs(0, scored.prompt_ids)
    scheduler.add(scored)
    first = scheduler.schedule()
    assert first is not None
    assert [(row.start, row.end, row.num_logits, row.samples) for row in first.rows] == [(0, 6, 6, False)]
    scored.prompt_logprobs._found += [None] * 6  # type: ignore[list-item]
    scheduler.postprocess(first)
    second = scheduler.schedule()
    assert second is not None
    assert [(row.start, row.end, row.num_logits, row.samples) for row in second.rows] == [(6, 9, 3, True)]


def test_sequence_that_outgrows_its_rotation_is_computed_anew() -> None:
    scheduler = make_scheduler(rope=RopeLengths(limit=10, switches=True))
    cache = FakeCache(scheduler)
    sequence = make_sequence(0, list(range(8)), max_tokens=6)
    scheduler.add(sequence)
    starts = []
    while not scheduler.idle:
        batch = cache.step()
        scheduler.check_integrity()
        starts += [(start, end) for _, start, end in shape(batch)]
    assert starts == [(0, 8), (8, 9), (9, 10), (0, 11), (11, 12), (12, 13)]


def test_preempted_sequence_is_not_in_the_step_that_took_its_blocks() -> None:
    scheduler = make_scheduler(6, rope=RopeLengths(limit=8, switches=True))
    cache = FakeCache(scheduler)
    scheduler.add(make_sequence(0, list(range(8)), max_tokens=6))
    scheduler.add(make_sequence(1, list(range(20, 32)), max_tokens=3))
    assert shape(cache.step()) == [(0, 0, 8), (1, 0, 12)]
    # The younger one has its row when the older, which is computed anew, finds too few blocks.
    assert shape(cache.step()) == [(0, 0, 9)]
    assert scheduler.num_preemptions == 1
    finish(cache)


def test_without_cache_every_row_starts_at_its_first_token() -> None:
    scheduler = Scheduler(blocks=None, max_num_seqs=2)
    for request_id in range(3):
        scheduler.add(make_sequence(request_id, [1, 2, 3], max_tokens=2))
    cache = FakeCache(scheduler)
    lengths = [[(start, end) for _, start, end in shape(batch)] for batch in iter(cache.step, None)]
    assert lengths == [[(0, 3), (0, 3)], [(0, 4), (0, 4)], [(0, 3)], [(0, 4)]]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 24), st.integers(1, 8)),
        st.tuples(st.just("add-alike"), st.integers(1, 24), st.integers(1, 8)),
        st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
        st.tuples(st.just("draft"), st.integers(1, 5), st.integers(0, 1)),
        st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("fail"), st.just(0), st.just(0)),
    ),
    max_size=50,
)


@settings(max_examples=200, deadline=None)
@given(
    num_blocks=st.integers(9, 24),
    block_size=st.integers(1, 5),
    slots=st.integers(1, 5),
    budget=st.integers(1, 12),
    window=st.sampled_from([None, None, 1, 5]),
    prefix_caching=st.booleans(),
    limit=st.sampled_from([None, 7]),
    switches=st.booleans(),
    actions=ACTIONS,
)
def test_random_schedules_conserve_blocks_and_finish_everything(
    num_blocks: int,
    block_size: int,
    slots: int,
    budget: int,
    window: int | None,
    prefix_caching: bool,
    limit: int | None,
    switches: bool,
    actions: list[tuple[str, int, int]],
) -> None:
    scheduler = make_scheduler(
        num_blocks,
        block_size=block_size,
        max_num_seqs=slots,
        max_batch_tokens=budget,
        window=window,
        prefix_caching=prefix_caching,
        rope=RopeLengths(limit=limit, switches=switches),
    )
    cache = FakeCache(scheduler)
    made: list[Sequence] = []
    for action, number, other in actions:
        if action.startswith("add"):
            prompt = list(range(number)) if action == "add-alike" else [100 * len(made) + one for one in range(number)]
            sequence = make_sequence(len(made), prompt, max_tokens=other, adapter_number=number % 2)
            try:
                scheduler.add(sequence)
                made.append(sequence)
            except RequestError:
                assert number + 1 > num_blocks * block_size or window is not None
        elif action == "step":
            for _ in range(number):
                cache.step()
        elif action == "draft":
            for sequence in scheduler.running:
                right = expected_answer(sequence)[len(sequence.token_ids) :]
                sequence.drafts = right[:number] if other else [*right[: number // 2], 99, 3]
        elif action == "abort" and number < len(made) and not made[number].finished:
            scheduler.abort(made[number])
            made[number].finish("aborted", now_s=0.0)
            assert not made[number].block_table
        elif action == "fail":
            scheduler.schedule()
            scheduler.restart([one for one in made if not one.finished])
            cache.places.clear()
        scheduler.check_integrity()
    finish(cache)
    for one in made:
        assert one.finish_reason == "aborted" or one.token_ids == expected_answer(one)


def test_ten_thousand_requests_leave_no_block_behind() -> None:
    chance = random.Random(0)
    scheduler = make_scheduler(40, block_size=4, max_num_seqs=16, max_batch_tokens=64)
    cache = FakeCache(scheduler, thorough=False)
    alive: list[Sequence] = []
    made = finished = aborted = 0
    while made < 10_000 or not scheduler.idle:
        for _ in range(chance.randrange(6) if made < 10_000 and len(alive) < 60 else 0):
            begin = chance.randrange(5)
            prompt = [*range(begin, begin + chance.randrange(1, 30)), *[made] * chance.randrange(3)]
            alive.append(make_sequence(made, prompt, max_tokens=chance.choice([1, 2, 3, 5, 30])))
            scheduler.add(alive[-1])
            made += 1
        if alive and chance.random() < 0.1:
            victim = chance.choice(alive)
            if not victim.finished:
                scheduler.abort(victim)
                victim.finish("aborted", now_s=0.0)
                aborted += 1
        assert cache.step() is not None or scheduler.idle
        if chance.random() < 0.02:
            scheduler.check_integrity()
        still = [one for one in alive if not one.finished]
        finished += len(alive) - len(still)
        alive = still
    scheduler.check_integrity()
    assert finished == made
    assert aborted > 100
    assert scheduler.num_preemptions > 100
    assert scheduler.prefix_hit_tokens > 10_000
    assert scheduler.blocks is not None
    assert scheduler.blocks.num_used == 0
