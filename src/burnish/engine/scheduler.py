"""Which tokens of which sequences are computed next. Torch-free.

Every step holds one token (and its drafts) of each sequence that is decoding and fills what is left of its token budget
with prompts, first come, first served, the last of them in part. When blocks run out, the sequence that came last gives
its own back and waits to be computed again; its tokens are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from burnish.engine.block_manager import BlockManager
from burnish.engine.rope_lengths import RopeLengths
from burnish.engine.sequence import Sequence
from burnish.errors import RequestError

# Waiting sequences that may be passed over in one step because another one computes their beginning.
_MOST_DEFERRED = 64


@dataclass(frozen=True, kw_only=True)
class Row:
    """Tokens start..end-1 of one sequence are computed in this step, drafts at their end included.

    Attributes:
        num_logits: how many of its last positions need logits: 0 while the prompt goes on, 1 where its last token is
            the sequence's last, one more for each draft, and those of a prompt whose own tokens are to be scored.
        drafts: guesses that follow the sequence's last token.
        samples: the last 1 + len(drafts) logits choose the next tokens.
    """

    sequence: Sequence
    start: int
    end: int
    num_logits: int
    drafts: tuple[int, ...] = ()
    samples: bool

    def tokens(self) -> list[int]:
        """The row's token ids, drafts included."""
        return [*self.sequence.tokens(self.start, self.end - len(self.drafts)), *self.drafts]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's work."""

    rows: list[Row]

    @property
    def num_tokens(self) -> int:
        return sum(row.end - row.start for row in self.rows)

    @property
    def decoding(self) -> bool:
        """Every row is one token of an answer, and its drafts."""
        return all(row.samples and row.end - row.start == 1 + len(row.drafts) for row in self.rows)


class Scheduler:
    """Continuous batching over a paged cache.

    Args:
        blocks: gives out the cache; None computes every sequence from its first token in every step.
        max_num_seqs: most sequences that run at once.
        max_batch_tokens: most tokens of one step (without a cache, one token more than this may be computed).
        max_scored_tokens: most tokens of one step whose logits are kept to score a prompt.
        block_bytes: memory of one block, for messages.
    """

    def __init__(
        self,
        *,
        blocks: BlockManager | None,
        max_num_seqs: int,
        max_batch_tokens: int = 512,
        max_scored_tokens: int = 512,
        rope: RopeLengths | None = None,
        block_bytes: int = 0,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_batch_tokens = max_batch_tokens
        self.max_scored_tokens = max_scored_tokens
        self.rope = rope or RopeLengths()
        self.block_bytes = block_bytes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_hit_tokens = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def check_fits(self, sequence: Sequence) -> None:
        """Make sure that a new sequence can run when it is alone; its `max_tokens` is cut to what the blocks leave.

        Raises:
            RequestError: the prompt and one token need more blocks than there are.
        """
        blocks = self.blocks
        if blocks is None:
            return
        prompt = len(sequence.prompt_ids)
        needed = blocks.most_blocks(prompt + 1, chunk=self.max_batch_tokens)
        if needed > blocks.num_blocks:
            size, room = blocks.block_size, blocks.num_blocks * self.block_bytes / 2**20
            raise RequestError(
                "the prompt does not fit the KV cache",
                got=f"{prompt} tokens, which need {needed * self.block_bytes / 2**20:.1f} MiB of cache",
                expected=f"at most {blocks.num_blocks * size - 1} tokens, as the cache has {room:.1f} MiB",
                remedy="Shorten the prompt, or raise kv_memory (or memory).",
            )
        if blocks.most_blocks(sequence.most_tokens, chunk=self.max_batch_tokens) > blocks.num_blocks:
            sequence.max_tokens = blocks.num_blocks * blocks.block_size - prompt

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; raises as `check_fits`."""
        self.check_fits(sequence)
        self.rope.start(sequence)
        self.waiting.append(sequence)

    def schedule(self) -> Batch | None:
        """Return the next step's work, or None when there is nothing to do."""
        rows = self._schedule_without_cache() if self.blocks is None else self._schedule(self.blocks)
        return Batch(rows=rows) if rows else None

    def postprocess(self, batch: Batch) -> list[Sequence]:
        """Note what was computed, once the new tokens are appended; return the sequences that finished.

        A sequence whose drafts were verified holds the accepted ones and one token more: only what it holds counts as
        computed, whatever the row covered.
        """
        finished = []
        for row in batch.rows:
            sequence = row.sequence
            sequence.drafts.clear()
            if self.blocks is not None:
                sequence.num_computed = min(row.end, sequence.num_tokens - 1)
                self.blocks.publish(sequence)
            if sequence.finished:
                finished.append(sequence)
                self._remove(sequence)
            elif self.blocks is not None and self.rope.outgrown(sequence):
                self._forget(sequence)
        return finished

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or running; its blocks are free at once."""
        if sequence in self.running:
            self._remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def restart(self, unfinished: Iterable[Sequence]) -> None:
        """Begin anew with these sequences, in this order; each is computed again from its first token.

        After a failed or interrupted step nobody knows what the cache holds or which sequence was on its way from one
        list to another; the tokens themselves are safe.
        """
        known = [*self.running, *self.waiting]
        self.running.clear()
        self.waiting = deque(sequence for sequence in unfinished if not sequence.finished)
        if self.blocks is not None:
            self.blocks.forget_all()
        for sequence in (*known, *self.waiting):
            sequence.running = False
            sequence.num_computed = sequence.num_published = sequence.num_dropped = 0
            del sequence.block_table[:]
            sequence.drafts.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every sequence and every block is where it should be."""
        assert len(self.running) <= self.max_num_seqs
        assert not set(self.running) & set(self.waiting)
        assert not any(sequence.finished for sequence in (*self.running, *self.waiting))
        assert all(not sequence.block_table and sequence.num_computed == 0 for sequence in self.waiting)
        if self.blocks is not None:
            self.blocks.check_integrity([*self.running, *self.waiting])
            for sequence in self.running:
                assert sequence.num_computed < sequence.num_tokens
                assert len(sequence.block_table) >= self.blocks.blocks_for(sequence.num_computed)

    def _schedule_without_cache(self) -> list[Row]:
        while self.waiting and len(self.running) < self.max_num_seqs:
            self.running.append(self.waiting.popleft())
            self.running[-1].running = True
        rows = []
        for sequence in self.running:
            sequence.num_computed = 0
            if self.rope.limit is not None:
                self.rope.outgrown(sequence)
            rows.append(self._row(sequence, sequence.num_tokens))
        return rows

    def _schedule(self, blocks: BlockManager) -> list[Row]:
        rows: dict[Sequence, Row] = {}
        preempted = self.num_preemptions
        budget = self._schedule_decoding(blocks, rows)
        for sequence in list(self.running):
            if budget <= 0:
                break
            if sequence.num_uncomputed == 1 or not sequence.running:
                continue
            end = min(sequence.num_tokens, sequence.num_computed + budget, self._scoring_end(sequence))
            target = sequence.num_tokens if blocks.window is None else end
            if self._reserve(blocks, sequence, target, rows):
                rows[sequence] = self._row(sequence, end)
                budget -= end - sequence.num_computed
        if preempted == self.num_preemptions:
            self._admit(blocks, rows, budget)
        return list(rows.values())

    def _schedule_decoding(self, blocks: BlockManager, rows: dict[Sequence, Row]) -> int:
        """One row for each decoding sequence; returns what is left of the budget."""
        decoding = [sequence for sequence in self.running if sequence.num_uncomputed == 1]
        budget = self.max_batch_tokens
        for place, sequence in enumerate(decoding):
            if budget <= 0:
                break
            if not sequence.running:
                continue
            others = len(decoding) - place - 1
            room = min(budget - 1 - others, sequence.max_tokens - len(sequence.token_ids) - 1)
            before_switch = self.rope.room(sequence)
            room = room if before_switch is None else min(room, before_switch)
            drafts = tuple(sequence.drafts[: max(0, room)])
            if drafts and not self._reserve_drafts(blocks, sequence, len(drafts), others):
                drafts = ()
            if self._reserve(blocks, sequence, sequence.num_tokens, rows):
                rows[sequence] = self._row(sequence, sequence.num_tokens, drafts)
                budget -= 1 + len(drafts)
        return budget

    def _reserve_drafts(self, blocks: BlockManager, sequence: Sequence, count: int, others: int) -> bool:
        """Find blocks for drafts, never at the cost of sequences that decode as well."""
        wanted = sequence.num_tokens + count
        missing = blocks.blocks_for(wanted) - len(sequence.block_table)
        return missing + (others if missing > 0 else 0) <= blocks.num_free and blocks.reserve(sequence, wanted)

    def _reserve(self, blocks: BlockManager, sequence: Sequence, num_tokens: int, rows: dict[Sequence, Row]) -> bool:
        """Find blocks for a running sequence, at the cost of those that came last; False when it is itself the last."""
        while not blocks.reserve(sequence, num_tokens):
            victim = self.running[-1]
            rows.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _admit(self, blocks: BlockManager, rows: dict[Sequence, Row], budget: int) -> None:
        """Start waiting sequences while tokens, blocks and places last."""
        computing = self._being_computed(blocks, rows.values())
        deferred: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            found = blocks.match(sequence, limit=min(sequence.num_tokens - 1, sequence.scoring_start))
            if self._follows(blocks, sequence, found, computing):
                # Somebody computes just what comes next: one step later it need not be computed twice.
                blocks.free(sequence)
                deferred.append(self.waiting.popleft())
                if len(deferred) >= _MOST_DEFERRED:
                    break
                continue
            sequence.num_computed = found
            end = min(sequence.num_tokens, found + budget, self._scoring_end(sequence))
            target = sequence.num_tokens if blocks.window is None else end
            # Those that run will soon want a block each; taking the last ones would only be undone.
            missing = blocks.blocks_for(target) - len(sequence.block_table)
            if missing + len(self.running) > blocks.num_free and (self.running or missing > blocks.num_free):
                sequence.num_computed = 0
                blocks.free(sequence)
                break
            blocks.reserve(sequence, target)
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.running = True
            self.prefix_hit_tokens += found
            row = rows[sequence] = self._row(sequence, end)
            computing |= self._being_computed(blocks, [row])
            budget -= end - found
        self.waiting.extendleft(reversed(deferred))

    def _being_computed(self, blocks: BlockManager, rows: Iterable[Row]) -> set[bytes]:
        """Hashes of the blocks that these rows complete, single tokens aside."""
        found: set[bytes] = set()
        if blocks.prefix_caching and self.waiting:
            for row in rows:
                if row.end - row.start > 1:
                    full = (row.end - len(row.drafts)) // blocks.block_size
                    found.update(blocks.hashes(row.sequence, full)[row.start // blocks.block_size :])
        return found

    def _follows(self, blocks: BlockManager, sequence: Sequence, found: int, computing: set[bytes]) -> bool:
        place = found // blocks.block_size
        if not computing or min(sequence.num_tokens - 1, sequence.scoring_start) // blocks.block_size <= place:
            return False
        return blocks.hashes(sequence, place + 1)[place] in computing

    def _scoring_end(self, sequence: Sequence) -> int:
        """Where a row has to end so that not too many logits are kept."""
        start = max(sequence.scoring_start, sequence.num_computed)
        return start + self.max_scored_tokens if start < len(sequence.prompt_ids) - 1 else sequence.num_tokens

    def _row(self, sequence: Sequence, end: int, drafts: tuple[int, ...] = ()) -> Row:
        start = sequence.num_computed
        samples = end == sequence.num_tokens
        num_logits = 1 + len(drafts) if samples else 0
        if sequence.scoring_start < len(sequence.prompt_ids) - 1:
            num_logits = end - max(start, sequence.scoring_start)
        return Row(
            sequence=sequence,
            start=start,
            end=end + len(drafts),
            num_logits=max(0, num_logits),
            drafts=drafts,
            samples=samples,
        )

    def _preempt(self, sequence: Sequence) -> None:
        self._remove(sequence)
        sequence.drafts.clear()
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _remove(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.running = False
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        if self.blocks is not None:
            self.blocks.free(sequence)
        sequence.num_computed = 0
