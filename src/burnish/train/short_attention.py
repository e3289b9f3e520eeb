"""Causal attention for short bfloat16 rows on a CPU, where torch's fused kernel is slow backwards.

Forward and backward of 8 rows of 150 tokens, 8 heads of 32: the fused kernel takes 50-62 ms, plain matrix products
19 ms (one core with AMX, torch 2.13). Longer rows, other dtypes and devices, and every window, bias or cap go to
`FullCausal`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from burnish.models.attention import AttentionSpec, FullCausal

# B rows, H query heads, K kv heads, G = H / K, T tokens, E head dim

MAX_TOKENS = 256


class ShortCausal(FullCausal):
    """`FullCausal` with plain products where these are faster; keeps (B, H, T, T) probabilities for the backward."""

    def __init__(self) -> None:
        super().__init__()
        self._causal: dict[tuple[int, int], Tensor] = {}

    def attend(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
        """Attend over the T tokens given; see `Attention.attend`."""
        num_rows, num_heads, num_tokens, _ = q_BHTE.shape
        short = q_BHTE.dtype == torch.bfloat16 and q_BHTE.device.type == "cpu" and num_tokens <= MAX_TOKENS
        if not (short and spec.is_plain and q_BHTE.requires_grad):
            return super().attend(layer, q_BHTE, k_BKTE, v_BKTE, spec)
        num_kv = k_BKTE.shape[1]
        groups = num_heads // num_kv
        # Query heads that share a kv head stand below one another, so that keys and values are never repeated.
        q = q_BHTE.reshape(num_rows * num_kv, groups * num_tokens, -1)
        k = k_BKTE.reshape(num_rows * num_kv, num_tokens, -1)
        v = v_BKTE.reshape(num_rows * num_kv, num_tokens, -1)
        mask = self._mask_of(groups, num_tokens).expand(len(q), -1, -1)
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=spec.scale)
        return torch.bmm(torch.softmax(scores, dim=-1), v).view(num_rows, num_heads, num_tokens, -1)

    def _mask_of(self, groups: int, num_tokens: int) -> Tensor:
        key = (groups, num_tokens)
        if key not in self._causal:
            mask = torch.full((num_tokens, num_tokens), -math.inf, dtype=torch.bfloat16).triu(1)
            self._causal[key] = mask.repeat(groups, 1)
        return self._causal[key]
