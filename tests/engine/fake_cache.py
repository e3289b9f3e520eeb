"""A cache that remembers which tokens were written where, and a loop that samples made-up tokens over it."""

from __future__ import annotations

from burnish.engine.sampling import SamplingParams
from burnish.engine.scheduler import Batch, Row, Scheduler
from burnish.engine.sequence import Sequence
from burnish.engine.text_stream import TextStream


class Silent:
    def push(self, token_id: int, /) -> str:
        return ""

    def flush(self) -> str:
        return ""


def make_sequence(request_id: int, prompt_ids: list[int], *, max_tokens: int = 4, adapter_number: int = 0) -> Sequence:
    """A request whose answer is what `answer_token` says."""
    return Sequence(
        request_id=request_id,
        index=request_id,
        prompt=None,
        prompt_ids=prompt_ids,
        params=SamplingParams(max_tokens=max_tokens),
        end_ids=frozenset(),
        max_tokens=max_tokens,
        text=TextStream(Silent()),
        adapter_number=adapter_number,
    )


def answer_token(before: list[int]) -> int:
    """The made-up model: its next token depends on all tokens before."""
    return (sum(before) * 31 + len(before)) % 7


class FakeCache:
    """Each place holds what keys and values depend on: the adapter and every token up to it.

    Args:
        thorough: check the past of decoding sequences in every step, not only of those that read prompts.
    """

    def __init__(self, scheduler: Scheduler, *, thorough: bool = True) -> None:
        self.scheduler = scheduler
        self.thorough = thorough
        self.states: dict[Sequence, tuple[object, list[int]]] = {}
        self.places: dict[tuple[int, int], int] = {}
        self.num_computed = 0
        self.most_used = 0

    def step(self) -> Batch | None:
        """Schedule, check that the past is where the tables say, write, sample, postprocess."""
        batch = self.scheduler.schedule()
        if batch is None:
            return None
        blocks = self.scheduler.blocks
        assert batch.rows
        assert len({row.sequence for row in batch.rows}) == len(batch.rows)
        if blocks is not None:
            assert sum(row.end - row.start for row in batch.rows) <= self.scheduler.max_batch_tokens
            self.most_used = max(self.most_used, blocks.num_used)
            written = [place for row in batch.rows for place in self.write(row)]
            assert len(written) == len(set(written)), "two rows write to one place"
        for row in batch.rows:
            self.num_computed += row.end - row.start
            assert row.samples == (row.end - len(row.drafts) == row.sequence.num_tokens)
            assert row.num_logits == (1 + len(row.drafts) if row.samples else 0)
            if row.samples:
                self.sample(row)
        self.scheduler.postprocess(batch)
        return batch

    def write(self, row: Row) -> list[tuple[int, int]]:
        blocks = self.scheduler.blocks
        assert blocks is not None
        sequence, size = row.sequence, blocks.block_size
        table = sequence.block_table
        states = self.past(sequence, row.start)
        if self.thorough or row.end - row.start > 1:
            oldest = 0 if blocks.window is None else max(0, row.start - blocks.window + 1)
            for position in range(oldest, row.start):
                place = (table[position // size], position % size)
                assert self.places.get(place) == states[position], "the cache does not hold this sequence's past"
        written = []
        state = states[row.start - 1] if row.start else hash(sequence.cache_salt)
        for position, token in enumerate(row.tokens(), start=row.start):
            state = hash((state, token))
            place = (table[position // size], position % size)
            assert place[0] >= 0
            self.places[place] = state
            written.append(place)
        return written

    def past(self, sequence: Sequence, count: int) -> list[int]:
        """What the places of the sequence's first `count` tokens (or more) have to hold."""
        salt, states = self.states.get(sequence, (None, []))
        if salt != sequence.cache_salt:
            salt, states = self.states[sequence] = (sequence.cache_salt, [])
        state = states[-1] if states else hash(salt)
        for token in sequence.tokens(len(states), max(count, len(states))):
            state = hash((state, token))
            states.append(state)
        return states

    def sample(self, row: Row) -> None:
        sequence = row.sequence
        for draft in (*row.drafts, None):
            token = answer_token(sequence.tokens(0, sequence.num_tokens))
            sequence.append(token, now_s=0.0)
            if sequence.finished or token != draft:
                return
