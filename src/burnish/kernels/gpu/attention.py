"""Attention of a step's packed rows over the paged cache, one kernel for single tokens, drafts and pieces of prompts.

The new keys and values are in the cache already. A *tile* is some consecutive tokens of one sequence; the R query heads
that share a kv head stand in its rows beside each other, so that each key is read once for all of them. The softmax
runs along the keys as in Dao et al., 2022, arXiv:2205.14135. Where tiles are few and contexts long, SPLITS programs
share a tile's keys and a second kernel joins their parts, as in Flash-Decoding (Dao et al., 2023).

Shapes: T packed tokens, S sequences, H query heads, K kv heads, R = H / K, E head dim, N blocks per sequence, P tokens
per block, G tiles, M rows of a tile, C keys at once.
"""

# Launch options are no parameters of the kernels.
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.gpu.support import AttentionTiles, padded_width

MOST_SPLITS = 16


@dataclass(frozen=True, kw_only=True)
class PagedRows:
    """Where a step's rows stand, int32 on the device.

    Attributes:
        row_starts: (S + 1,).
        context_lens_S: tokens in the cache once the step's are written; 0 for a row that is only padding.
        tables_SN: block ids, below 0 where there is none.
    """

    row_starts: Tensor
    context_lens_S: Tensor
    tables_SN: Tensor


@dataclass(frozen=True, kw_only=True)
class CacheLayer:
    """One layer's keys and values, (num_blocks, P, K, E), and for int8 their scales, (num_blocks, P, K) float32."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreRule:
    """How scores come about: see `AttentionSpec`; slopes are float32 on the device, rounded already if they are."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes_H: Tensor | None = None
    alibi_scale: float = 1.0
    alibi_bfloat16: bool = False


def paged_attention(
    q_THE: Tensor,
    cache: CacheLayer,
    rows: PagedRows,
    rule: ScoreRule,
    *,
    tile_sequences_G: Tensor,
    tile_tokens_G: Tensor,
    tiles: AttentionTiles,
    splits: int,
    out_THE: Tensor,
) -> None:
    """Compute the tokens of these tiles into `out_THE`; the others stay as they are.

    Args:
        q_THE: rotated, contiguous.
        tile_sequences_G, tile_tokens_G: int32 sequence and first packed token of each tile, which reaches
            `tiles.rows // R` tokens further or to the end of its sequence's row.
        splits: programs that share a tile's keys; a power of two.
    """
    num_tiles = len(tile_sequences_G)
    if num_tiles == 0:
        return
    _, num_heads, head_dim = q_THE.shape
    num_kv_heads = cache.keys.shape[2]
    width, repeats = padded_width(head_dim), num_heads // num_kv_heads
    assert tiles.rows >= repeats
    partial = q_THE.new_empty((num_tiles, num_kv_heads, splits, tiles.rows, head_dim + 2), dtype=torch.float32)
    common = (rows.row_starts, tile_sequences_G, tile_tokens_G, num_heads)
    _attend[num_tiles, num_kv_heads, splits](
        q_THE,
        out_THE,
        partial,
        cache.keys,
        cache.values,
        cache.keys if cache.key_scales is None else cache.key_scales,
        cache.values if cache.value_scales is None else cache.value_scales,
        rows.tables_SN,
        rows.context_lens_S,
        q_THE if rule.slopes_H is None else rule.slopes_H,
        *common,
        rows.tables_SN.stride(0),
        rule.scale,
        rule.softcap or 0.0,
        rule.alibi_scale,
        rule.window or 0,
        NUM_KV_HEADS=num_kv_heads,
        R=repeats,
        E=head_dim,
        E_PADDED=width,
        P=cache.keys.shape[1],
        M=tiles.rows,
        C=tiles.keys,
        SPLITS=splits,
        QUANTIZED=cache.key_scales is not None,
        SOFTCAP=rule.softcap is not None,
        WINDOW=rule.window is not None,
        ALIBI=rule.slopes_H is not None,
        ALIBI_BF16=rule.alibi_bfloat16,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if splits > 1:
        _join[num_tiles, num_kv_heads](
            partial,
            out_THE,
            *common,
            R=repeats,
            E=head_dim,
            E_PADDED=width,
            M=tiles.rows,
            SPLITS=splits,
            num_warps=4,
        )


def splits_for(num_tiles: int, num_kv_heads: int, *, longest: int, processors: int, keys: int) -> int:
    """Programs per tile such that the card is busy and each has several turns of `keys` keys to do."""
    wanted = 2 * processors // max(1, num_tiles * num_kv_heads)
    useful = longest // (4 * keys)
    splits = max(1, min(wanted, useful, MOST_SPLITS))
    return 1 << (splits.bit_length() - 1)


@triton.jit
def _tanh(x):
    # Beyond 15 float32 is 1; clamped, the exponential cannot overflow. Comparisons let NaN through, minima would not.
    x = tl.where(x > 15.0, 15.0, tl.where(x < -15.0, -15.0, x))
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _rounded_to_bfloat16(x):
    """Half to even by the bits: cards without bfloat16 have no instruction for it."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _attend(
    q,
    out,
    partial,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    context_lens,
    slopes,
    row_starts,
    tile_sequences,
    tile_tokens,
    num_heads,
    table_stride,
    scale,
    softcap,
    alibi_scale,
    window,
    NUM_KV_HEADS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    ALIBI_BF16: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(tile_sequences + tile)
    first = tl.load(tile_tokens + tile)
    end = tl.load(row_starts + sequence + 1)
    context = tl.load(context_lens + sequence)

    rows_M = tl.arange(0, M)
    dims_E = tl.arange(0, E_PADDED)
    tokens_M = first + rows_M // R
    heads_M = kv_head * R + rows_M % R
    real_M = (rows_M < (M // R) * R) & (tokens_M < end)
    real_E = dims_E < E
    positions_M = context - end + tokens_M
    places_M = (tokens_M * num_heads + heads_M).to(tl.int64) * E
    q_ME = tl.load(q + places_M[:, None] + dims_E[None, :], mask=real_M[:, None] & real_E[None, :], other=0.0)

    # Keys that any row of the tile sees, shared among the splits in whole turns of C.
    last = tl.minimum(end, first + M // R)
    seen_end = tl.maximum(context - end + last, 0)
    seen_begin = 0
    if WINDOW:
        seen_begin = tl.maximum(context - end + first - window + 1, 0) // C * C
    turns = tl.cdiv(tl.maximum(seen_end - seen_begin, 0), C)
    per_split = tl.cdiv(turns, SPLITS)
    begin = seen_begin + split * per_split * C
    stop = tl.minimum(begin + per_split * C, seen_end)

    if ALIBI:
        slopes_M = tl.load(slopes + heads_M, mask=real_M, other=0.0)
        bias_M = slopes_M * positions_M.to(tl.float32)
        if ALIBI_BF16:
            bias_M = _rounded_to_bfloat16(bias_M)
    highest_M = tl.full((M,), float("-inf"), dtype=tl.float32)
    total_M = tl.zeros((M,), dtype=tl.float32)
    sum_ME = tl.zeros((M, E_PADDED), dtype=tl.float32)
    for start in range(begin, stop, C):
        positions_C = start + tl.arange(0, C)
        inside_C = positions_C < stop
        blocks_C = tl.load(tables + sequence.to(tl.int64) * table_stride + positions_C // P, mask=inside_C, other=-1)
        inside_C = inside_C & (blocks_C >= 0)
        slots_C = (blocks_C.to(tl.int64) * P + positions_C % P) * NUM_KV_HEADS + kv_head
        load_CE = inside_C[:, None] & real_E[None, :]
        k_CE = tl.load(keys + slots_C[:, None] * E + dims_E[None, :], mask=load_CE, other=0)
        scores_MC = tl.dot(q_ME, tl.trans(k_CE.to(q_ME.dtype)), input_precision="ieee") * scale
        if QUANTIZED:
            scores_MC = scores_MC * tl.load(key_scales + slots_C, mask=inside_C, other=0.0)[None, :]
        if SOFTCAP:
            scores_MC = softcap * _tanh(scores_MC / softcap)
        if ALIBI:
            bias_MC = slopes_M[:, None] * positions_C[None, :].to(tl.float32)
            if ALIBI_BF16:
                bias_MC = _rounded_to_bfloat16(bias_MC)
            scores_MC = scores_MC + bias_MC * alibi_scale - (bias_M * alibi_scale)[:, None]
        seen_MC = inside_C[None, :] & (positions_C[None, :] <= positions_M[:, None])
        if WINDOW:
            seen_MC = seen_MC & (positions_M[:, None] - positions_C[None, :] < window)
        scores_MC = tl.where(seen_MC, scores_MC, float("-inf"))
        raised_M = tl.maximum(highest_M, tl.max(scores_MC, axis=1))
        # A row that has seen nothing yet stays at -inf, from which nothing may be subtracted.
        floor_M = tl.where(raised_M == float("-inf"), 0.0, raised_M)
        weights_MC = tl.exp(scores_MC - floor_M[:, None])
        shrink_M = tl.exp(highest_M - floor_M)
        total_M = total_M * shrink_M + tl.sum(weights_MC, axis=1)
        if QUANTIZED:
            weights_MC = weights_MC * tl.load(value_scales + slots_C, mask=inside_C, other=0.0)[None, :]
        v_CE = tl.load(values + slots_C[:, None] * E + dims_E[None, :], mask=load_CE, other=0)
        added_ME = tl.dot(weights_MC.to(q_ME.dtype), v_CE.to(q_ME.dtype), input_precision="ieee")
        sum_ME = sum_ME * shrink_M[:, None] + added_ME
        highest_M = raised_M

    store_ME = real_M[:, None] & real_E[None, :]
    if SPLITS == 1:
        # A padding row has no keys and becomes 0.
        sum_ME = sum_ME / tl.where(total_M == 0.0, 1.0, total_M)[:, None]
        tl.store(out + places_M[:, None] + dims_E[None, :], sum_ME.to(out.dtype.element_ty), mask=store_ME)
    else:
        part = (((tile * NUM_KV_HEADS + kv_head) * SPLITS + split) * M).to(tl.int64)
        parts_M = partial + (part + rows_M) * (E + 2)
        tl.store(parts_M[:, None] + dims_E[None, :], sum_ME, mask=store_ME)
        tl.store(parts_M + E, highest_M, mask=real_M)
        tl.store(parts_M + E + 1, total_M, mask=real_M)


@triton.jit
def _join(
    partial,
    out,
    row_starts,
    tile_sequences,
    tile_tokens,
    num_heads,
    R: tl.constexpr,
    E: tl.constexpr,
    E_PADDED: tl.constexpr,
    M: tl.constexpr,
    SPLITS: tl.constexpr,
):
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first = tl.load(tile_tokens + tile)
    end = tl.load(row_starts + tl.load(tile_sequences + tile) + 1)
    rows_M = tl.arange(0, M)
    dims_E = tl.arange(0, E_PADDED)
    tokens_M = first + rows_M // R
    real_M = (rows_M < (M // R) * R) & (tokens_M < end)
    mask_ME = real_M[:, None] & (dims_E < E)[None, :]
    part = ((tile * tl.num_programs(1) + kv_head) * SPLITS * M).to(tl.int64)
    parts_M = partial + (part + rows_M) * (E + 2)
    highest_M = tl.full((M,), float("-inf"), dtype=tl.float32)
    total_M = tl.zeros((M,), dtype=tl.float32)
    sum_ME = tl.zeros((M, E_PADDED), dtype=tl.float32)
    for split in range(SPLITS):
        split_M = parts_M + split * M * (E + 2)
        peak_M = tl.load(split_M + E, mask=real_M, other=float("-inf"))
        raised_M = tl.maximum(highest_M, peak_M)
        floor_M = tl.where(raised_M == float("-inf"), 0.0, raised_M)
        kept_M, grown_M = tl.exp(highest_M - floor_M), tl.exp(peak_M - floor_M)
        total_M = total_M * kept_M + tl.load(split_M + E + 1, mask=real_M, other=0.0) * grown_M
        part_ME = tl.load(split_M[:, None] + dims_E[None, :], mask=mask_ME, other=0.0)
        sum_ME = sum_ME * kept_M[:, None] + part_ME * grown_M[:, None]
        highest_M = raised_M
    sum_ME = sum_ME / tl.where(total_M == 0.0, 1.0, total_M)[:, None]
    places_M = (tokens_M * num_heads + kv_head * R + rows_M % R).to(tl.int64) * E
    tl.store(out + places_M[:, None] + dims_E[None, :], sum_ME.to(out.dtype.element_ty), mask=mask_ME)
