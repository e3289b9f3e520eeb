"""Which rows make which optimizer step, as a function of the seed and of the step's number. Torch-free.

Nothing is carried from step to step: a run that resumes at step n asks for step n, and computes the order of the epoch
that it lies in and of no other. Memory is some 30 bytes per row, whatever the rows hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from burnish.train.packing_plan import pack_in_order, pack_rows

Ordering = Literal["grouped", "shuffled", "given"]
ORDERINGS: tuple[str, ...] = get_args(Ordering)
GROUP_STEPS = 32  # rows of that many steps are sorted by length together; enough to remove nearly all padding


def row_lengths(examples: Sequence[Any]) -> NDArray[np.int32]:
    """Tokens of each row; of a `TokenCache`, without reading them."""
    known = getattr(examples, "lengths", None)
    if known is not None:
        return np.asarray(known, dtype=np.int32)
    return np.fromiter((len(example.tokens) for example in examples), dtype=np.int32, count=len(examples))


@dataclass(frozen=True, kw_only=True)
class RowOrder:
    """The steps of a run, epoch after epoch, without end.

    Attributes:
        lengths: tokens of each row.
        rows_per_step: rows of a step; the last step of an epoch may have fewer.
        ordering: "shuffled" draws steps at random; "grouped" also sorts runs of `GROUP_STEPS` steps by length, so that
            rows of a step are about equally long, and then shuffles the steps; "given" keeps the order of the data.
        seed: of the draws.
        tokens_per_step: instead of `rows_per_step`: as many rows as fit into so many tokens. "grouped" and "shuffled"
            pack all rows by best fit (`pack_rows`), equally long ones in another draw each epoch; "given" packs
            neighbours.
    """

    lengths: NDArray[np.int32]
    rows_per_step: int
    ordering: Ordering = "grouped"
    seed: int = 0
    tokens_per_step: int | None = None

    def steps_per_epoch(self) -> int:
        """Steps of one pass over the rows, equal for every epoch."""
        if self.tokens_per_step is None:
            return -(-len(self.lengths) // self.rows_per_step)
        pack = pack_in_order if self.ordering == "given" else pack_rows
        return len(pack(self.lengths, self.tokens_per_step))

    def epoch(self, epoch: int) -> list[list[int]]:
        """Row numbers of each step of one epoch, longest row of a step first."""
        return [self._longest_first(step) for step in self._epoch(epoch)]

    def start_from(self, step: int = 0) -> Iterator[list[int]]:
        """Row numbers of step `step` (counted from 0) and of those after it."""
        epoch, begin = divmod(step, self.steps_per_epoch())
        while True:
            for rows in self._epoch(epoch)[begin:]:
                yield self._longest_first(rows)
            epoch, begin = epoch + 1, 0

    def _longest_first(self, rows: NDArray[np.int64]) -> list[int]:
        return rows[np.lexsort((rows, -self.lengths[rows]))].tolist()

    def _epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        digest = hashlib.blake2b(f"{self.seed}/{epoch}".encode(), digest_size=16).digest()
        source = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
        count = len(self.lengths)
        rows = np.arange(count) if self.ordering == "given" else source.permutation(count)
        if self.tokens_per_step is not None:
            pack = pack_in_order if self.ordering == "given" else pack_rows
            steps = [rows[np.asarray(group)] for group in pack(self.lengths[rows], self.tokens_per_step)]
        else:
            if self.ordering == "grouped":
                spans = np.arange(count) // (self.rows_per_step * GROUP_STEPS)
                rows = rows[np.lexsort((rows, self.lengths[rows], spans))]
            cuts = range(0, count, self.rows_per_step)
            steps = [rows[start : start + self.rows_per_step] for start in cuts]
        if self.ordering == "grouped" or (self.tokens_per_step is not None and self.ordering == "shuffled"):
            steps = [steps[number] for number in source.permutation(len(steps))]
        return steps
