"""The seam between the decoder and whoever keeps keys and values: the spec, the protocol, and plain causal attention.

A KV cache is another `Attention` and lives in `engine/`; the decoder only calls `attend` once per layer.

Shapes: B sequences, H query heads, K kv heads, T query tokens, S key tokens, E head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionSpec:
    """What one layer's attention computes, beside its inputs.

    Attributes:
        scale: multiplies q @ k.
        window: a query at position p sees keys at p - window + 1 .. p; None sees all of 0 .. p.
        alibi_slopes_H: (H,) float32 on CPU, or None; use `alibi_bias`, which also knows scale and rounding.
        softcap: scores become softcap * tanh(scores / softcap) before the mask; None without.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    alibi_slopes_H: Tensor | None = None
    alibi_scale: float = 1.0
    alibi_bfloat16: bool = False
    softcap: float | None = None
    _slopes_by_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @property
    def is_plain(self) -> bool:
        """Nothing but scaled, causal softmax attention: any fused kernel will do."""
        return self.window is None and self.alibi_slopes_H is None and self.softcap is None

    def alibi_bias(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """The bias to add to the scaled scores: falls linearly with distance, 0 at the query's own position.

        Press et al., 2021, arXiv:2108.12409.

        Args:
            query_positions: (..., T) integers, and `key_positions`: (..., S), on the same device.

        Returns:
            (..., H, T, S) float32.
        """
        assert self.alibi_slopes_H is not None
        device = query_positions.device
        slopes_H = self._slopes_by_device.get(device)
        if slopes_H is None:
            slopes_H = self._slopes_by_device[device] = self.alibi_slopes_H.to(device)
        slopes_H1 = slopes_H[:, None]
        if self.alibi_bfloat16:
            slopes_H1 = slopes_H1.bfloat16()
        query_HT = (slopes_H1 * query_positions[..., None, :]).float() * self.alibi_scale
        key_HS = (slopes_H1 * key_positions[..., None, :]).float() * self.alibi_scale
        return key_HS[..., None, :] - query_HT[..., :, None]


class Attention(Protocol):
    """Turns one layer's queries, keys and values into its output; may remember keys and values between calls."""

    def attend(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
        """Attend causally. q and k are normed and rotated already; k and v are not repeated to H heads.

        Returns:
            (B, H, T, E), same dtype as q.
        """
        ...


class FullCausal:
    """Causal attention over exactly the tokens given, with nothing remembered: training and scoring.

    Padding on the right needs no mask, as no real token sees it. Masks are kept for as long as the object lives, so
    make one per forward (the decoder does).
    """

    def __init__(self) -> None:
        self._masks: dict[tuple[object, ...], Tensor] = {}

    def attend(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
        """Attend over the T tokens given; see `Attention.attend`."""
        num_tokens = q_BHTE.shape[-2]
        window = spec.window if spec.window is not None and spec.window < num_tokens else None
        if window is None and spec.alibi_slopes_H is None and spec.softcap is None:
            return grouped_attention(q_BHTE, k_BKTE, v_BKTE, scale=spec.scale, is_causal=True)
        mask = self._mask(num_tokens, window, spec, q_BHTE.dtype, q_BHTE.device)
        if spec.softcap is not None:
            return softcapped_attention(q_BHTE, k_BKTE, v_BKTE, mask, scale=spec.scale, softcap=spec.softcap)
        return grouped_attention(q_BHTE, k_BKTE, v_BKTE, scale=spec.scale, mask=mask)

    def _mask(
        self, num_tokens: int, window: int | None, spec: AttentionSpec, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        slopes = spec.alibi_slopes_H
        key = (num_tokens, window, None if slopes is None else slopes.data_ptr(), dtype, device)
        mask = self._masks.get(key)
        if mask is None:
            positions_T = torch.arange(num_tokens, device=device)
            mask = visible(positions_T, positions_T, window)
            if slopes is not None:
                mask = spec.alibi_bias(positions_T, positions_T).masked_fill(~mask, -math.inf).to(dtype)[None]
            self._masks[key] = mask
        return mask


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Which keys a query sees: (..., T) and (..., S) positions to a (..., T, S) boolean mask, True where it looks."""
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def grouped_attention(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Fused attention where H / K query heads share one kv head.

    Args:
        mask: broadcasts to (B, H, T, S); boolean (True is seen) or additive in q's dtype. With 2 or 4 dimensions
            the fused kernels take it; with 3 torch falls back to materialised scores.
        is_causal: only where T equals S.
    """
    return F.scaled_dot_product_attention(
        q_BHTE,
        k_BKSE,
        v_BKSE,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
    )


def softcapped_attention(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: Tensor, *, scale: float, softcap: float
) -> Tensor:
    """Attention with bounded scores, which no fused kernel offers: materialises (B, H, T, S) scores."""
    groups = q_BHTE.shape[1] // k_BKSE.shape[1]
    q_BKGTE = q_BHTE.unflatten(1, (-1, groups))
    scores = (q_BKGTE @ k_BKSE[:, :, None].transpose(-1, -2)) * scale
    scores = (torch.tanh(scores / softcap) * softcap).flatten(1, 2)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q_BHTE.dtype)
    return (weights.unflatten(1, (-1, groups)) @ v_BKSE[:, :, None]).flatten(1, 2)


def alibi_slopes(num_heads: int) -> list[float]:
    """One slope per head: powers of 2 ** (-8 / n) for the largest power of two n, then every second one of 2 n.

    Press et al., 2021, arXiv:2108.12409, section 3.
    """
    base_heads = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * k / base_heads) for k in range(1, base_heads + 1)]
    extra = [2.0 ** (-4.0 * k / base_heads) for k in range(1, 2 * (num_heads - base_heads), 2)]
    return slopes + extra


def spec_of_layer(config: ModelConfig, layer: int) -> AttentionSpec:
    """The spec that `config` implies for one layer."""
    slopes = torch.tensor(alibi_slopes(config.num_heads), device="cpu") if config.position == "alibi" else None
    return AttentionSpec(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=config.scale(layer),
        window=config.window(layer),
        alibi_slopes_H=slopes,
        alibi_scale=config.alibi_scale,
        alibi_bfloat16=config.alibi_bfloat16,
        softcap=config.attention_softcap,
    )
