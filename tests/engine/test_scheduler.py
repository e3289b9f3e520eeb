"""Whatever comes and goes, slots stay dense, nobody starves, and the cache always holds what a sequence believes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.engine.sampling import SamplingParams
from burnish.engine.scheduler import Batch, Scheduler
from burnish.engine.sequence import Sequence
from burnish.engine.text_stream import TextStream


class Silent:
    def push(self, token_id: int, /) -> str:
        return ""

    def flush(self) -> str:
        return ""


def sequence(request_id: int, prompt_length: int, max_tokens: int = 4) -> Sequence:
    return Sequence(
        request_id=request_id,
        index=request_id,
        prompt=None,
        prompt_ids=[1000 * request_id + place for place in range(prompt_length)],
        params=SamplingParams(max_tokens=max_tokens),
        end_ids=frozenset(),
        max_tokens=max_tokens,
        text=TextStream(Silent()),
    )


class FakeCache:
    """Slots that remember which tokens were written, as the real cache would."""

    def __init__(self) -> None:
        self.slots: dict[int, list[int]] = {}

    def run(self, batch: Batch) -> None:
        for move in batch.moves:
            self.slots[move.target] = self.slots[move.source][: move.length]
        first = batch.rows[0].sequence.slot
        assert [row.sequence.slot for row in batch.rows] == list(range(first, first + len(batch.rows)))
        for row in batch.rows:
            held = self.slots.get(row.sequence.slot, [])[: row.start]
            assert held == row.sequence.tokens(0, row.start), "the cache does not hold this sequence's past"
            self.slots[row.sequence.slot] = held + row.sequence.tokens(row.start, row.end)

    def step(self, scheduler: Scheduler) -> Batch | None:
        batch = scheduler.schedule()
        if batch is not None:
            self.run(batch)
            for row in batch.rows:
                if row.samples:
                    row.sequence.append(len(row.sequence.token_ids), now_s=0.0)
            scheduler.postprocess(batch)
        scheduler.check_integrity()
        return batch


def test_prompts_of_equal_length_are_read_together_within_the_budget() -> None:
    scheduler = Scheduler(max_num_seqs=8, max_batch_tokens=12)
    for request_id in range(4):
        scheduler.add(sequence(request_id, 4))
    cache = FakeCache()
    sizes = [len(batch.rows) for batch in iter(lambda: cache.step(scheduler), None)]
    assert sizes[:3] == [3, 1, 4]


def test_prompts_of_different_length_are_not_padded_much() -> None:
    scheduler = Scheduler(max_num_seqs=8, max_batch_tokens=100)
    for request_id, length in enumerate([10, 9, 30]):
        scheduler.add(sequence(request_id, length))
    batch = FakeCache().step(scheduler)
    assert batch is not None
    assert [row.end for row in batch.rows] == [10, 9]


def test_long_prompt_is_read_in_pieces_between_decode_steps() -> None:
    scheduler = Scheduler(max_num_seqs=2, max_batch_tokens=4)
    cache = FakeCache()
    scheduler.add(sequence(0, 2, max_tokens=9))
    scheduler.add(sequence(1, 10, max_tokens=2))
    seen = [
        [(row.sequence.request_id, row.start, row.end) for row in batch.rows]
        for batch in iter(lambda: cache.step(scheduler), None)
    ]
    assert seen[:6] == [[(0, 0, 2)], [(1, 0, 4)], [(0, 2, 3)], [(1, 4, 8)], [(0, 3, 4)], [(1, 8, 10)]]


def test_last_slot_moves_into_the_hole() -> None:
    scheduler = Scheduler(max_num_seqs=3)
    cache = FakeCache()
    sequences = [sequence(request_id, 3, max_tokens=9) for request_id in range(3)]
    for one in sequences:
        scheduler.add(one)
    cache.step(scheduler)
    scheduler.abort(sequences[0])
    batch = cache.step(scheduler)
    assert batch is not None
    assert [(move.source, move.target, move.length) for move in batch.moves] == [(2, 0, 3)]
    assert sequences[2].slot == 0


def test_without_cache_every_row_starts_at_its_first_token() -> None:
    scheduler = Scheduler(max_num_seqs=2, kv_cache=False)
    sequences = [sequence(request_id, 3, max_tokens=2) for request_id in range(3)]
    for one in sequences:
        scheduler.add(one)
    lengths = []
    while (batch := scheduler.schedule()) is not None:
        lengths.append([(row.start, row.end) for row in batch.rows])
        for row in batch.rows:
            row.sequence.append(7, now_s=0.0)
        scheduler.postprocess(batch)
        scheduler.check_integrity()
    assert lengths == [[(0, 3), (0, 3)], [(0, 4), (0, 4)], [(0, 3)], [(0, 4)]]


@settings(max_examples=150, deadline=None)
@given(
    slots=st.integers(1, 4),
    budget=st.integers(1, 9),
    padding=st.floats(0, 1),
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 20), st.integers(1, 6)),
            st.tuples(st.just("step"), st.integers(1, 4), st.just(0)),
            st.tuples(st.just("abort"), st.integers(0, 30), st.just(0)),
            st.tuples(st.just("fail"), st.just(0), st.just(0)),
        ),
        max_size=40,
    ),
)
def test_random_schedules_keep_slots_dense_and_finish_everything(
    slots: int, budget: int, padding: float, actions: list[tuple[str, int, int]]
) -> None:
    scheduler = Scheduler(max_num_seqs=slots, max_batch_tokens=budget, max_padding=padding)
    cache = FakeCache()
    made: list[Sequence] = []
    for action, number, max_tokens in actions:
        if action == "add":
            made.append(sequence(len(made), number, max_tokens))
            scheduler.add(made[-1])
        elif action == "step":
            for _ in range(number):
                cache.step(scheduler)
        elif action == "abort" and number < len(made) and not made[number].finished:
            scheduler.abort(made[number])
            made[number].finish("aborted", now_s=0.0)
        elif action == "fail":
            scheduler.schedule()
            scheduler.restart([one for one in made if not one.finished])
            cache.slots.clear()
        scheduler.check_integrity()
    steps = 0
    while not scheduler.idle:
        assert cache.step(scheduler) is not None
        steps += 1
        assert steps < 5000, "a sequence starves"
    for one in made:
        assert one.finish_reason == "aborted" or len(one.token_ids) == one.max_tokens
        assert one.slot == -1
