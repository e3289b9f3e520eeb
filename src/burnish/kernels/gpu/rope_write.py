"""Rotating queries and keys and writing keys and values to their places in the cache, in one pass over q, k and v.

Shapes: T packed tokens, H query heads, K kv heads, E head dim, F rotated frequencies (2 F <= E rotated dims).
"""

# Launch options are no parameters of the kernels.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.gpu.attention import CacheLayer
from burnish.kernels.gpu.support import padded_width


def rope_and_write(
    qkv_TXE: Tensor,
    cache: CacheLayer,
    places_T: Tensor,
    *,
    num_heads: int,
    cos_TF: Tensor | None,
    sin_TF: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """Fill the cache at flat places (block * P + place) and return the rotated queries.

    Args:
        qkv_TXE: (T, H + 2 K, E), contiguous: all queries, then keys, then values of a token.
        cache: written to; int8 rounds each token and head by its largest magnitude, half to even.
        places_T: int32; below 0 the token is not kept.
        cos_TF, sin_TF: None rotates nothing.

    Returns:
        q_THE, contiguous.
    """
    num_tokens, num_all, head_dim = qkv_TXE.shape
    num_kv_heads = cache.keys.shape[2]
    assert num_all == num_heads + 2 * num_kv_heads
    q_THE = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv_TXE.dtype, device=qkv_TXE.device)
    quantized = cache.key_scales is not None
    _rope_and_write[num_tokens, num_all](
        qkv_TXE,
        q_THE,
        cache.keys,
        cache.values,
        cache.key_scales if cache.key_scales is not None else cache.keys,
        cache.value_scales if cache.value_scales is not None else cache.values,
        places_T,
        qkv_TXE if cos_TF is None else cos_TF,
        qkv_TXE if sin_TF is None else sin_TF,
        num_heads,
        num_kv_heads,
        0 if cos_TF is None else cos_TF.shape[1],
        E=head_dim,
        E_PADDED=padded_width(head_dim),
        INTERLEAVED=interleaved,
        QUANTIZED=quantized,
        num_warps=1,
    )
    return q_THE


@triton.jit
def _rope_and_write(
    qkv,
    q,
    keys,
    values,
    key_scales,
    value_scales,
    places,
    cos,
    sin,
    num_heads,
    num_kv_heads,
    num_frequencies,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims_E = tl.arange(0, E_PADDED)
    real_E = dims_E < E
    row = qkv + (token * tl.num_programs(1) + head) * E
    x_E = tl.load(row + dims_E, mask=real_E, other=0.0)
    if head < num_heads + num_kv_heads:
        # Every rotated dim has a partner, and an angle that it shares with it.
        turned_E = dims_E < 2 * num_frequencies
        if INTERLEAVED:
            partner_E, angle_E, second_E = dims_E ^ 1, dims_E // 2, (dims_E & 1) == 1
        else:
            second_E = dims_E >= num_frequencies
            angle_E = tl.where(second_E, dims_E - num_frequencies, dims_E)
            partner_E = tl.where(second_E, angle_E, dims_E + num_frequencies)
        other_E = tl.load(row + partner_E, mask=turned_E, other=0.0).to(tl.float32)
        cos_E = tl.load(cos + token * num_frequencies + angle_E, mask=turned_E, other=1.0).to(tl.float32)
        sin_E = tl.load(sin + token * num_frequencies + angle_E, mask=turned_E, other=0.0).to(tl.float32)
        rotated_E = x_E.to(tl.float32) * cos_E + tl.where(second_E, other_E, -other_E) * sin_E
        x_E = rotated_E.to(qkv.dtype.element_ty)
    if head < num_heads:
        tl.store(q + (token * num_heads + head) * E + dims_E, x_E, mask=real_E)
    else:
        place = tl.load(places + token).to(tl.int64)
        is_key = head < num_heads + num_kv_heads
        kv_head = head - num_heads
        if not is_key:
            kv_head = kv_head - num_kv_heads
        slot = place * num_kv_heads + kv_head
        kept_E = real_E & (place >= 0)
        if QUANTIZED:
            wide_E = x_E.to(tl.float32)
            # The sum adds 0, or NaN where anything is not finite: a maximum alone would pass over it.
            scale = tl.max(tl.abs(wide_E), axis=0) / 127.0 + tl.sum(wide_E * 0.0, axis=0)
            # Adding and subtracting 1.5 * 2^23 rounds half to even.
            steps_E = wide_E / tl.maximum(scale, 1e-30)
            steps_E = (steps_E + 12582912.0) - 12582912.0
            ints_E = tl.where(scale >= 0, tl.minimum(tl.maximum(steps_E, -127.0), 127.0), 0.0).to(tl.int8)
            if is_key:
                tl.store(keys + slot * E + dims_E, ints_E, mask=kept_E)
                tl.store(key_scales + slot, scale, mask=place >= 0)
            else:
                tl.store(values + slot * E + dims_E, ints_E, mask=kept_E)
                tl.store(value_scales + slot, scale, mask=place >= 0)
        else:
            if is_key:
                tl.store(keys + slot * E + dims_E, x_E.to(keys.dtype.element_ty), mask=kept_E)
            else:
                tl.store(values + slot * E + dims_E, x_E.to(values.dtype.element_ty), mask=kept_E)
