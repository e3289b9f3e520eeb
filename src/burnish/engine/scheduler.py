"""Which sequences run next, and in which slots of the cache. Torch-free.

Slots in use are always 0..n-1, so that the model reads contiguous views of the cache: decoding sequences first, then
the one whose prompt is read in pieces, if any. When a slot becomes free, the last one moves into it (`Batch.moves`).

Prompts are admitted first come, first served, as soon as slots are free, whole prompts of similar length together. A
prompt longer than the token budget is read alone, in pieces, with a decode step for the others between two pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from burnish.engine.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Row:
    """Tokens start..end-1 of one sequence are computed in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """True when the row's last token is the sequence's last: its logits give the next token."""
        return self.end == self.sequence.num_tokens


@dataclass(frozen=True, kw_only=True)
class Move:
    """The cache of `length` tokens goes from one slot to another."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's work: rows in slots `rows[0].sequence.slot` upwards, after the cache did `moves` in order."""

    rows: list[Row]
    moves: list[Move] = field(default_factory=list)


class Scheduler:
    """Continuous batching over a fixed number of slots.

    Args:
        max_num_seqs: number of slots.
        max_batch_tokens: most tokens (padding included) of one step that reads prompts.
        max_padding: a prompt joins a step only when padding stays under this share of the step's tokens.
        kv_cache: False computes every sequence from its first token in every step.
    """

    def __init__(
        self, *, max_num_seqs: int, max_batch_tokens: int = 512, max_padding: float = 0.15, kv_cache: bool = True
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.max_padding = max_padding
        self.kv_cache = kv_cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._moves: list[Move] = []
        self._decode_turn = False

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """Return the next step's work, or None when there is nothing to do."""
        rows = self._schedule_rows()
        if not rows:
            return None
        moves, self._moves = self._moves, []
        return Batch(rows=rows, moves=moves)

    def postprocess(self, batch: Batch) -> list[Sequence]:
        """Note what was computed; free the slots of sequences that finished and return these."""
        for row in batch.rows:
            if row.sequence.slot >= 0 and self.kv_cache:
                row.sequence.num_computed = row.end
        finished = [row.sequence for row in batch.rows if row.sequence.finished]
        for sequence in finished:
            self._free(sequence)
        return finished

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or running; its slot is free at once."""
        if sequence.slot >= 0:
            self._free(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def restart(self, unfinished: Iterable[Sequence]) -> None:
        """Begin anew with these sequences, in this order; each is computed again from its first token.

        After a failed or interrupted step nobody knows what the cache holds or which sequence was on its way from one
        list to another; the tokens themselves are safe.
        """
        self.running.clear()
        self._moves.clear()
        self.waiting = deque(sequence for sequence in unfinished if not sequence.finished)
        for sequence in self.waiting:
            sequence.slot, sequence.num_computed = -1, 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless every slot is where it should be."""
        assert [sequence.slot for sequence in self.running] == list(range(len(self.running)))
        assert len(self.running) <= self.max_num_seqs
        assert all(sequence.slot == -1 and sequence.num_computed == 0 for sequence in self.waiting)
        assert not any(sequence.finished for sequence in (*self.running, *self.waiting))
        if self.kv_cache:
            partial = [sequence for sequence in self.running if sequence.num_uncomputed > 1]
            assert partial in ([], self.running[-1:])

    def _schedule_rows(self) -> list[Row]:
        if not self.kv_cache:
            self._admit(self.max_num_seqs - len(self.running), 10**12)
            return [Row(sequence=sequence, start=0, end=sequence.num_tokens) for sequence in self.running]
        partial = self.running[-1] if self.running and self.running[-1].num_uncomputed > 1 else None
        if partial is None:
            admitted = self._admit_prompts()
            if admitted:
                return admitted
        elif not (self._decode_turn and len(self.running) > 1):
            self._decode_turn = True
            return [self._prompt_row(partial)]
        self._decode_turn = False
        decoding = self.running if partial is None else self.running[:-1]
        return [Row(sequence=sequence, start=sequence.num_computed, end=sequence.num_tokens) for sequence in decoding]

    def _admit_prompts(self) -> list[Row]:
        """Give slots to the first waiting prompts that fit one step together."""
        longest = total = count = 0
        for sequence in self.waiting:
            length = sequence.num_tokens
            padded = max(longest, length) * (count + 1)
            too_much = padded > self.max_batch_tokens or padded - total - length > self.max_padding * padded
            if count + len(self.running) >= self.max_num_seqs or (count and too_much):
                break
            longest, total, count = max(longest, length), total + length, count + 1
            if length > self.max_batch_tokens:
                break
        rows = [self._prompt_row(sequence) for sequence in self._admit(count, count)]
        self._decode_turn = bool(rows)
        return rows

    def _admit(self, free: int, count: int) -> list[Sequence]:
        admitted = []
        while self.waiting and len(admitted) < min(free, count):
            sequence = self.waiting.popleft()
            sequence.slot = len(self.running)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def _prompt_row(self, sequence: Sequence) -> Row:
        start = sequence.num_computed
        return Row(sequence=sequence, start=start, end=min(sequence.num_tokens, start + self.max_batch_tokens))

    def _free(self, sequence: Sequence) -> None:
        hole, last = sequence.slot, len(self.running) - 1
        sequence.slot, sequence.num_computed = -1, 0
        if hole == last:
            self.running.pop()
            return
        if self.kv_cache and self.running[last].num_uncomputed > 1 and hole != last - 1:
            self._move(last - 1, hole)
            hole = last - 1
        self._move(last, hole)
        self.running.pop()

    def _move(self, source: int, target: int) -> None:
        moved = self.running[source]
        moved.slot = target
        self.running[target] = moved
        if moved.num_computed:
            self._moves.append(Move(source=source, target=target, length=moved.num_computed))
