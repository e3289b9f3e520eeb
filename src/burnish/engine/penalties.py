"""Penalties on tokens that a sequence already holds, applied to all rows of a batch at once.

Work grows with the distinct tokens a sequence holds, not with the vocabulary.

Shapes: B rows, V vocabulary, N (row, token) pairs of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from burnish.engine.sampling import SamplingParams


class TokenCounts:
    """The distinct tokens of one sequence, and how often its answer holds each."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt_ids)
        self._prompt = list(distinct)
        self._restart()

    @property
    def ids_N(self) -> np.ndarray:
        """int64, in order of first appearance."""
        return self._ids[: len(self._places)]

    @property
    def counts_N(self) -> np.ndarray:
        """float32, 0 for a token of the prompt only."""
        return self._counts[: len(self._places)]

    def follow(self, token_ids: Sequence[int]) -> None:
        """Count the answer `token_ids`; cheap when it is the last one with some tokens more."""
        known = len(self._answer)
        if self._answer != token_ids[:known]:
            self._restart()
            known = 0
        for token_id in token_ids[known:]:
            place = self._places.setdefault(token_id, len(self._places))
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token_id
            self._counts[place] += 1
        self._answer += token_ids[known:]

    def _restart(self) -> None:
        size = len(self._prompt) + 64
        self._places = {token_id: place for place, token_id in enumerate(self._prompt)}
        self._ids = np.zeros(size, dtype=np.int64)
        self._ids[: len(self._prompt)] = self._prompt
        self._counts = np.zeros(size, dtype=np.float32)
        self._answer: list[int] = []


def apply_penalties(logits_BV: Tensor, rows: list[tuple[int, SamplingParams, TokenCounts]]) -> None:
    """Change the logits of the given rows in place: the repetition penalty first, then presence and frequency.

    Args:
        logits_BV: float32.
        rows: index of the row, what its request asks, and what it holds.
    """
    if not rows:
        return
    device = logits_BV.device
    sizes_R = torch.tensor([len(counts.ids_N) for _, _, counts in rows], device=device)
    settings_R4 = torch.tensor(
        [
            (row, params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
            for row, params, _ in rows
        ],
        device=device,
    )
    row_N, repetition_N, presence_N, frequency_N = settings_R4.repeat_interleave(sizes_R, dim=0).unbind(-1)
    ids_N = torch.from_numpy(np.concatenate([counts.ids_N for _, _, counts in rows])).to(device)
    counts_N = torch.from_numpy(np.concatenate([counts.counts_N for _, _, counts in rows])).to(device)
    places = (row_N.long(), ids_N)
    logits_N = logits_BV[places]
    logits_N = torch.where(logits_N > 0, logits_N / repetition_N, logits_N * repetition_N)
    logits_BV[places] = logits_N - frequency_N * counts_N - presence_N * (counts_N > 0)
