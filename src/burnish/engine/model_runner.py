"""Running one batch of the scheduler: rows packed for the backend, its logits to tokens, tokens to their sequences.

Shapes: T packed tokens, S sequences, L positions whose logits are wanted, N blocks of the longest table, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from burnish.engine.sampler import Sampler, accept_greedy
from burnish.engine.scheduler import Batch, Row
from burnish.engine.step import Backend, StepInputs
from burnish.errors import BurnishError, OutOfMemoryError


class ModelRunner:
    """Computes batches and appends what is sampled.

    Args:
        max_batch_tokens: without a cache, tokens computed at once; bounds the memory of activations.

    Attributes:
        backend_s: seconds spent in the backend so far.
    """

    def __init__(self, backend: Backend, *, max_batch_tokens: int) -> None:
        self.backend = backend
        self.sampler = Sampler()
        self.max_batch_tokens = max_batch_tokens
        self.backend_s = 0.0
        self.num_steps = 0
        self.output_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0

    def prepare(self, max_num_seqs: int) -> None:
        """Let a backend that captures graphs do so now, for as many sequences."""
        warm_up = getattr(self.backend, "warm_up", None)
        if warm_up is not None:
            with _memory_errors():
                warm_up(max_num_seqs)

    def run(self, batch: Batch) -> None:
        """Compute the batch; the sequences of rows that sample receive their next tokens.

        Raises:
            OutOfMemoryError: the machine's memory does not hold the activations.
            BurnishError: the logits are not numbers.
        """
        self.num_steps += 1
        with _memory_errors(), torch.inference_mode():
            for rows in self._pieces(batch.rows):
                self._run(rows)

    def _run(self, rows: list[Row]) -> None:
        greedy = not any(row.num_logits and self._needs_logits(row) for row in rows)
        step = pack_rows(rows, block_size=self.backend.block_size)
        started = time.perf_counter()
        result = self.backend.forward(step, greedy=greedy)
        token_ids: list[int] = result.tolist() if greedy else []
        self.backend_s += time.perf_counter() - started
        if greedy:
            self._take_greedy(rows, token_ids)
        else:
            self._sample(rows, result)

    def _needs_logits(self, row: Row) -> bool:
        scored = row.sequence.prompt_logprobs
        scores = scored is not None and not scored.complete
        return scores or (row.samples and self.sampler.needs_logits(row.sequence))

    def _take_greedy(self, rows: list[Row], token_ids: list[int]) -> None:
        if token_ids and min(token_ids) < 0:
            raise BurnishError(
                "the model's logits are not numbers (NaN)", remedy="Try --dtype float32, or check the checkpoint."
            )
        now_s = time.perf_counter()
        begin = 0
        for row in rows:
            if row.num_logits:
                end = begin + row.num_logits
                self._take(row, accept_greedy(token_ids[begin:end], row.drafts, row.sequence), now_s)
                begin = end

    def _sample(self, rows: list[Row], logits_LV: Tensor) -> None:
        plain: list[tuple[Row, int]] = []
        drafted: list[tuple[Row, int]] = []
        end = 0
        for row in rows:
            begin, end = end, end + row.num_logits
            scored = row.sequence.prompt_logprobs
            if scored is not None and row.num_logits and not scored.complete:
                scored.add(logits_LV[begin:end], start=row.end - row.num_logits)
            if row.samples:
                (drafted if row.drafts else plain).append((row, end - 1 - len(row.drafts)))
        # Every row is chosen from before any sequence changes, so that an error leaves all as they were.
        chosen: list[tuple[Row, list]] = []
        if plain:
            places = [place for _, place in plain]
            logits_BV = logits_LV if places == list(range(logits_LV.shape[0])) else logits_LV[places]
            sampled = self.sampler.sample(logits_BV, [row.sequence for row, _ in plain])
            chosen += [(row, [one]) for (row, _), one in zip(plain, sampled)]
        for row, place in drafted:
            logits_KV = logits_LV[place : place + 1 + len(row.drafts)]
            chosen.append((row, self.sampler.verify(logits_KV, row.drafts, row.sequence)))
        now_s = time.perf_counter()
        for row, sampled in chosen:
            self._take(row, sampled, now_s)

    def _take(self, row: Row, sampled: list, now_s: float) -> None:
        sequence = row.sequence
        before = len(sequence.token_ids)
        for one in sampled:
            sequence.take(one, now_s=now_s)
            if sequence.finished:
                break
        taken = len(sequence.token_ids) - before
        self.output_tokens += taken
        if row.drafts:
            accepted = max(0, taken - 1)
            sequence.num_drafted += len(row.drafts)
            sequence.num_accepted += accepted
            self.drafted_tokens += len(row.drafts)
            self.accepted_tokens += accepted

    def _pieces(self, rows: list[Row]) -> Iterator[list[Row]]:
        """All rows at once; without a cache, as many whole sequences as the token budget allows."""
        if self.backend.num_blocks:
            yield rows
            return
        piece: list[Row] = []
        for row in rows:
            if piece and sum(one.end for one in piece) + row.end > self.max_batch_tokens:
                yield piece
                piece = []
            piece.append(row)
        yield piece


def pack_rows(rows: list[Row], *, block_size: int) -> StepInputs:
    """The rows as the backend wants them."""
    counts = [row.end - row.start for row in rows]
    row_starts = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(counts, out=row_starts[1:])
    tokens: list[int] = []
    for row in rows:
        tokens += row.tokens()
    ends_S = np.array([row.end for row in rows], dtype=np.int32)
    num_tokens = len(tokens)
    # Of each sequence, positions count up to its end: end - (row's end among the packed tokens) + place.
    shifts_T = np.repeat(ends_S - row_starts[1:], counts)
    tables_SN = np.full((len(rows), max(len(row.sequence.block_table) for row in rows)), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        # Blocks past the row's end (the prompt's, reserved ahead) are not this step's.
        used = -(-row.end // block_size)
        table = row.sequence.block_table[:used]
        tables_SN[index, : len(table)] = table
    wanted = [np.arange(end - row.num_logits, end) for row, end in zip(rows, row_starts[1:].tolist()) if row.num_logits]
    return StepInputs(
        tokens_T=np.array(tokens, dtype=np.int32),
        positions_T=np.arange(num_tokens, dtype=np.int32) + shifts_T.astype(np.int32),
        row_starts=row_starts,
        context_lens_S=ends_S,
        block_tables_SN=tables_SN,
        logit_rows_L=np.concatenate(wanted).astype(np.int32) if wanted else np.zeros(0, dtype=np.int32),
        adapters_S=np.array([row.sequence.adapter for row in rows], dtype=np.int32),
        rope_lens_S=np.array([row.sequence.rope_len for row in rows], dtype=np.int32),
    )


@contextmanager
def _memory_errors() -> Iterator[None]:
    remedy = "Use fewer sequences at once, shorter contexts, or a smaller dtype."
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError("the device ran out of memory while generating", remedy=remedy) from error
    except MemoryError as error:
        raise OutOfMemoryError("the machine ran out of memory while generating", remedy=remedy) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError("the machine ran out of memory while generating", remedy=remedy) from error
