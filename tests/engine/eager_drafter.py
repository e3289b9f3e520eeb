"""A drafter that guesses whenever there is something to copy, whatever it costs, and now and then wrongly."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from burnish.engine.ngram_drafter import NgramDrafter
from burnish.engine.sequence import Sequence


class EagerDrafter(NgramDrafter):
    """Every `wrong_every`-th guess ends in a token that nobody predicted; 0 never."""

    def __init__(self, *, wrong_every: int = 3) -> None:
        super().__init__()
        self._wrong_every = wrong_every
        self._count = 0

    def draft(self, sequences: SequenceOf[Sequence]) -> None:
        super().draft(sequences)
        for sequence in sequences:
            self._count += 1
            if self._wrong_every and self._count % self._wrong_every == 0:
                sequence.drafts[2:] = [3 + self._count % 7]

    def _worthwhile(self, num_sequences: int, chances: list[float]) -> int:
        return len(chances)
