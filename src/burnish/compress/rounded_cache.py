"""A decoder as an engine with an 8-bit KV cache runs it, for measuring what such a cache costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from burnish.kernels.reference import cached
from burnish.models.attention import AttentionSpec, FullCausal
from burnish.models.decoder import Decoder

# B sequences, T tokens, K kv heads, E head dim

KV_DTYPES = ("auto", "int8")


class RoundedCacheModel(nn.Module):
    """A decoder whose attention reads keys and values that 8 bits hold, with a scale per token and head.

    Args:
        decoder: not changed.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.config = decoder.config

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """As `Decoder.hidden`."""
        return self.decoder.hidden(tokens_BT, attention=_RoundedCausal())

    def logits(self, hidden: Tensor) -> Tensor:
        """As `Decoder.logits`."""
        return self.decoder.logits(hidden)


class _RoundedCausal(FullCausal):
    def attend(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
        return super().attend(layer, q_BHTE, _rounded(k_BKTE), _rounded(v_BKTE), spec)


def _rounded(x_BKTE: Tensor) -> Tensor:
    return cached(x_BKTE.flatten(0, 1), torch.int8).view(x_BKTE.shape).to(x_BKTE.dtype)
