"""The seam for speculation: who guesses the tokens that the next step verifies, and when. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from burnish.engine.sequence import Sequence
from burnish.errors import ConfigError

SPECULATION = ("auto", "ngram", "off")
# With more sequences than these a step is soon bound by arithmetic, and a guessed row costs what a sure one does.
_AUTO_SEQUENCES = 4


class Drafter(Protocol):
    """Guesses how answers go on. A wrong guess costs a token's computation and changes nothing else."""

    def draft(self, sequences: SequenceOf[Sequence]) -> None:
        """Set `drafts` of those sequences that are worth a guess, before a step; all of them are decoding.

        The scheduler may take fewer, or none. `Sequence.num_drafted` and `num_accepted` tell how earlier guesses did.
        """
        ...

    def observe(self, num_rows: int, seconds: float) -> None:
        """Learn what a step cost in which every sequence was decoding.

        Args:
            num_rows: tokens computed, drafts included.
        """
        ...


def check_speculation(speculation: str) -> str:
    """The option's value, checked.

    Raises:
        ConfigError: there is no such way.
    """
    if speculation not in SPECULATION:
        raise ConfigError("unknown speculation", got=speculation, expected=", ".join(SPECULATION))
    return speculation


def make_drafter(speculation: str, *, kv_cache: bool) -> Drafter | None:
    """Who guesses: "ngram" for any number of sequences, "auto" for a few at once, nobody for "off".

    Either guesses only where that is measured to pay.

    Raises:
        ConfigError: there is no such way, or it was asked for without a cache.
    """
    if check_speculation(speculation) == "ngram" and not kv_cache:
        raise ConfigError("speculation needs the KV cache", got="ngram without kv_cache", expected="auto or off")
    if speculation == "off" or not kv_cache:
        return None
    from burnish.engine.ngram_drafter import NgramDrafter

    return NgramDrafter(most_sequences=_AUTO_SEQUENCES if speculation == "auto" else None)
