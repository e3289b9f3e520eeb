"""The seam for speculation: who guesses the tokens that the next step verifies. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from burnish.engine.sequence import Sequence


class Drafter(Protocol):
    """Guesses how answers go on. A wrong guess costs a token's computation and changes nothing else."""

    def draft(self, sequences: SequenceOf[Sequence]) -> None:
        """Set `drafts` of those sequences that are worth a guess, before a step; all of them are decoding.

        The scheduler may take fewer, or none. `Sequence.num_drafted` and `num_accepted` tell how earlier guesses did.
        """
        ...
