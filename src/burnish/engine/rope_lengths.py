"""How the rotation of a sequence's tokens depends on its length, for the two rules where it does. Torch-free.

"dynamic" stretches the frequencies with every token past the trained length: a token is rotated as in a sequence that
ends with it, prompt tokens as in one that ends with the prompt. "longrope" has two sets of frequencies; when a sequence
outgrows the first, all of its tokens are computed again with the second.
"""

from __future__ import annotations

from dataclasses import dataclass

from burnish.engine.sequence import Sequence
from burnish.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class RopeLengths:
    """The rule of one model.

    Attributes:
        limit: up to this many tokens length does not matter; None where it never does.
        switches: past it, everything is rotated anew.
    """

    limit: int | None = None
    switches: bool = False

    def start(self, sequence: Sequence) -> None:
        """Set a new sequence's length for rotation, and keep apart what must not share blocks."""
        sequence.rope_len = len(sequence.prompt_ids)
        self._salt(sequence)

    def outgrown(self, sequence: Sequence) -> bool:
        """Whether the sequence now needs all of its tokens rotated anew; its length is then noted.

        The caller frees its blocks.
        """
        if self.limit is None or not self.switches or not sequence.rope_len <= self.limit < sequence.num_tokens:
            return False
        sequence.rope_len = sequence.num_tokens
        sequence.block_hashes.clear()
        self._salt(sequence)
        return True

    def room(self, sequence: Sequence) -> int | None:
        """How many tokens more may be computed before everything is rotated anew; None for any number."""
        if self.limit is None or not self.switches or sequence.rope_len > self.limit:
            return None
        return self.limit - sequence.num_tokens

    def _salt(self, sequence: Sequence) -> None:
        bucket = 0 if self.limit is None else max(sequence.rope_len, self.limit)
        sequence.cache_salt = (sequence.adapter_number, bucket)


def rope_lengths(config: ModelConfig, *, max_model_len: int) -> RopeLengths:
    """The rule of `config` for sequences of up to `max_model_len` tokens."""
    limits: list[tuple[int, bool]] = []
    for scaling in (config.rope_scaling, config.local_rope_scaling):
        if scaling is not None and scaling["rope_type"] == "dynamic":
            limits.append((config.max_position_embeddings, False))
        elif scaling is not None and scaling["rope_type"] == "longrope":
            limits.append((scaling["original_max_position_embeddings"], True))
    if not limits or max_model_len <= min(limits)[0]:
        return RopeLengths()
    return RopeLengths(limit=min(limits)[0], switches=any(switches for _, switches in limits))


def longest_context(config: ModelConfig) -> int:
    """Most tokens that positions of this model are made for."""
    scaling = config.rope_scaling
    if config.position == "rotary" and scaling is not None and scaling["rope_type"] == "dynamic":
        # Here the config names the length before stretching.
        return int(config.max_position_embeddings * max(1.0, scaling["factor"]))
    return config.max_position_embeddings
