"""Cutting a step's packed rows into pieces that pipeline stages compute one after another. Torch-free.

A piece is a step of its own: its rows attend to what is in the cache and to earlier pieces, which are there by then.
"""

from __future__ import annotations

import itertools

import numpy as np

from burnish.engine.step import StepInputs

# Fewer rows take a stage about as long as these: cutting finer would only read the weights more often.
LEAST_TOKENS = 64


def cut_step(step: StepInputs, most: int) -> list[StepInputs]:
    """The step in at most so many pieces of about as many tokens each, in the rows' order."""
    num_tokens = len(step.tokens_T)
    count = max(1, min(most, num_tokens // LEAST_TOKENS))
    if count == 1:
        return [step]
    ends = [num_tokens * place // count for place in range(count + 1)]
    return [_piece(step, begin, end) for begin, end in itertools.pairwise(ends)]


def _piece(step: StepInputs, begin: int, end: int) -> StepInputs:
    starts = step.row_starts
    first = int(np.searchsorted(starts, begin, side="right")) - 1
    last = int(np.searchsorted(starts, end, side="left"))
    row_starts = np.clip(starts[first : last + 1], begin, end) - begin
    rows = slice(first, last)
    wanted = (step.logit_rows_L >= begin) & (step.logit_rows_L < end)
    positions_T = step.positions_T[begin:end]
    return StepInputs(
        tokens_T=step.tokens_T[begin:end],
        positions_T=positions_T,
        row_starts=row_starts.astype(np.int32),
        context_lens_S=(positions_T[row_starts[1:] - 1] + 1).astype(np.int32),
        block_tables_SN=step.block_tables_SN[rows],
        logit_rows_L=(step.logit_rows_L[wanted] - begin).astype(np.int32),
        adapters_S=step.adapters_S[rows],
        rope_lens_S=step.rope_lens_S[rows],
    )
