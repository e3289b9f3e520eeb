"""Linears whose weights have 4 or 8 bits and whose activations stay in 16 or 32: bound by memory where rows are few.

Up to `FEW_ROWS` rows one kernel rebuilds the weight tile by tile beside the product; more rows are worth rebuilding a
slab of the weight in the activations' dtype, which torch's own matrix product then reads.

Shapes: M rows, N out features, K in features, G groups, Q columns as kept; see `grouped_weight`.
"""

# Launch options are no parameters of the kernels.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.gpu.grouped_weight import HALF, GroupedWeight
from burnish.kernels.gpu.support import padded_width, processors_of

FEW_ROWS = 64
SLAB_WEIGHTS = 1 << 25
"""Weights rebuilt at once for many rows: 64 MiB in 16 bits."""
_BLOCK_N = 64
_MOST_SPLITS = 8
_BLOCK_REBUILT = 32


def weight_only_linear(x_MK: Tensor, weight: GroupedWeight, bias_N: Tensor | None, *, splits: int = 0) -> Tensor:
    """x W' + bias, (M, N) in x's dtype; sums are float32.

    Args:
        x_MK: contiguous rows.
        splits: programs that share the columns of one output tile; 0 keeps the card busy.
    """
    x_MQ = weight.arranged(x_MK)
    if x_MK.shape[0] > FEW_ROWS:
        return _by_slabs(x_MQ, weight, bias_N)
    num_rows, out_features = x_MK.shape[0], weight.out_features
    if num_rows == 0:
        return x_MK.new_empty((0, out_features))
    block_rows = padded_width(num_rows)
    turns = weight.num_columns // weight.block_columns
    tiles = -(-out_features // _BLOCK_N)
    if splits == 0:
        wanted = 2 * processors_of(x_MK.device) // tiles
        splits = max(1, min(wanted, turns // 4, _MOST_SPLITS))
    out_MN = x_MK.new_empty((num_rows, out_features))
    partial = out_MN if splits == 1 else x_MK.new_empty((splits, num_rows, out_features), dtype=torch.float32)
    _product[tiles, splits](
        x_MQ,
        weight.codes,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        partial if bias_N is None else bias_N,
        partial,
        num_rows,
        out_features,
        x_MQ.shape[1],
        weight.group_width // weight.block_columns,
        turns,
        triton.cdiv(turns, splits),
        BITS=weight.bits,
        BIAS=bias_N is not None,
        SPLIT=splits > 1,
        HALF_CHUNK=HALF,
        BLOCK_M=block_rows,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=weight.block_columns,
        num_warps=4,
        num_stages=3 if block_rows <= 32 else 2,
    )
    if splits == 1:
        return out_MN
    _sum_splits[triton.cdiv(num_rows * out_features, 1024),](
        partial,
        out_MN if bias_N is None else bias_N,
        out_MN,
        num_rows * out_features,
        out_features,
        SPLITS=splits,
        BIAS=bias_N is not None,
        BLOCK=1024,
        num_warps=4,
    )
    return out_MN


def rebuilt(weight: GroupedWeight, dtype: torch.dtype, *, first: int = 0, last: int | None = None) -> Tensor:
    """Rows first..last of the weight as kept, (rows, Q) in `dtype`; filling is not 0 and has to meet zeros."""
    last = weight.out_features if last is None else last
    weight_RQ = torch.empty((last - first, weight.num_columns), dtype=dtype, device=weight.codes.device)
    _rebuild[triton.cdiv(last - first, _BLOCK_REBUILT), weight.num_columns // weight.block_columns](
        weight.codes,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight_RQ,
        first,
        last,
        weight.out_features,
        weight.num_columns,
        weight.group_width // weight.block_columns,
        BITS=weight.bits,
        HALF_CHUNK=HALF,
        BLOCK_N=_BLOCK_REBUILT,
        BLOCK_K=weight.block_columns,
        num_warps=4,
    )
    return weight_RQ


def _by_slabs(x_MQ: Tensor, weight: GroupedWeight, bias_N: Tensor | None) -> Tensor:
    # Filling at the end has no column of x: it is left out of the product.
    columns = x_MQ.shape[1]
    rows = max(1, SLAB_WEIGHTS // weight.num_columns)
    if rows >= weight.out_features:
        return F.linear(x_MQ, rebuilt(weight, x_MQ.dtype)[:, :columns], bias_N)
    y_MN = x_MQ.new_empty((x_MQ.shape[0], weight.out_features))
    for first in range(0, weight.out_features, rows):
        last = min(first + rows, weight.out_features)
        slab_RQ = rebuilt(weight, x_MQ.dtype, first=first, last=last)[:, :columns]
        y_MN[:, first:last] = F.linear(x_MQ, slab_RQ, None if bias_N is None else bias_N[first:last])
    return y_MN


@triton.jit
def _product(
    x,
    codes,
    scales,
    zeros,
    bias,
    out,
    num_rows,
    out_features,
    x_columns,
    turns_per_group,
    turns,
    turns_per_split,
    BITS: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    HALF_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(1)
    rows_M = tl.arange(0, BLOCK_M)
    outs_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_M, real_N = rows_M < num_rows, outs_N < out_features
    x_rows_M = rows_M.to(tl.int64) * x_columns
    if BITS == 8:
        columns_K = tl.arange(0, BLOCK_K)
        bytes_K = columns_K
        code_rows_N = outs_N.to(tl.int64) * (turns * BLOCK_K)
    else:
        bytes_K = tl.arange(0, BLOCK_K // 2)
        columns_K = bytes_K // HALF_CHUNK * (2 * HALF_CHUNK) + bytes_K % HALF_CHUNK
        code_rows_N = outs_N.to(tl.int64) * (turns * BLOCK_K // 2)
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    begin = split * turns_per_split
    for turn in range(begin, tl.minimum(begin + turns_per_split, turns)):
        group = turn // turns_per_group * out_features
        scale_N = tl.load(scales + group + outs_N, mask=real_N, other=0.0).to(tl.float32)
        low_K = turn * BLOCK_K + columns_K
        x_MK = tl.load(
            x + x_rows_M[:, None] + low_K[None, :], mask=real_M[:, None] & (low_K < x_columns)[None, :], other=0.0
        )
        if BITS == 8:
            codes_NK = tl.load(codes + code_rows_N[:, None] + low_K[None, :], mask=real_N[:, None], other=0)
            part_MN = tl.dot(x_MK, tl.trans(codes_NK.to(x_MK.dtype)), input_precision="ieee")
        else:
            place_K = turn * (BLOCK_K // 2) + bytes_K
            codes_NK = tl.load(codes + code_rows_N[:, None] + place_K[None, :], mask=real_N[:, None], other=0)
            codes_NK = codes_NK.to(tl.int32)
            zero_N = tl.load(zeros + group + outs_N, mask=real_N, other=0).to(tl.int32)
            low_NK = ((codes_NK & 15) - zero_N[:, None]).to(x_MK.dtype)
            high_NK = ((codes_NK >> 4) - zero_N[:, None]).to(x_MK.dtype)
            high_K = low_K + HALF_CHUNK
            x_high_MK = tl.load(
                x + x_rows_M[:, None] + high_K[None, :], mask=real_M[:, None] & (high_K < x_columns)[None, :], other=0.0
            )
            part_MN = tl.dot(x_MK, tl.trans(low_NK), input_precision="ieee")
            part_MN = tl.dot(x_high_MK, tl.trans(high_NK), part_MN, input_precision="ieee")
        sum_MN += part_MN * scale_N[None, :]
    places_MN = rows_M[:, None].to(tl.int64) * out_features + outs_N[None, :]
    mask_MN = real_M[:, None] & real_N[None, :]
    if SPLIT:
        tl.store(out + split.to(tl.int64) * num_rows * out_features + places_MN, sum_MN, mask=mask_MN)
    else:
        if BIAS:
            sum_MN += tl.load(bias + outs_N, mask=real_N, other=0.0).to(tl.float32)[None, :]
        tl.store(out + places_MN, sum_MN.to(out.dtype.element_ty), mask=mask_MN)


@triton.jit
def _sum_splits(partial, bias, out, size, out_features, SPLITS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = places < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial + split * size + places, mask=real, other=0.0)
    if BIAS:
        total += tl.load(bias + places % out_features, mask=real, other=0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=real)


@triton.jit
def _rebuild(
    codes,
    scales,
    zeros,
    out,
    first,
    last,
    out_features,
    num_columns,
    turns_per_group,
    BITS: tl.constexpr,
    HALF_CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    outs_N = first + rows_N
    real_N = outs_N < last
    columns_K = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    group = tl.program_id(1) // turns_per_group * out_features
    scale_N = tl.load(scales + group + outs_N, mask=real_N, other=0.0).to(tl.float32)
    if BITS == 8:
        places_NK = outs_N[:, None].to(tl.int64) * num_columns + columns_K[None, :]
        ints_NK = tl.load(codes + places_NK, mask=real_N[:, None], other=0).to(tl.int32)
    else:
        # Neighbouring columns of one half chunk share their bytes with the other half: each byte is read twice.
        within_K = columns_K % (2 * HALF_CHUNK)
        bytes_K = columns_K // (2 * HALF_CHUNK) * HALF_CHUNK + within_K % HALF_CHUNK
        places_NK = outs_N[:, None].to(tl.int64) * (num_columns // 2) + bytes_K[None, :]
        ints_NK = tl.load(codes + places_NK, mask=real_N[:, None], other=0).to(tl.int32)
        ints_NK = (ints_NK >> tl.where(within_K < HALF_CHUNK, 0, 4)[None, :]) & 15
        ints_NK -= tl.load(zeros + group + outs_N, mask=real_N, other=0).to(tl.int32)[:, None]
    weight_NK = ints_NK.to(tl.float32) * scale_N[:, None]
    kept_NK = rows_N[:, None].to(tl.int64) * num_columns + columns_K[None, :]
    tl.store(out + kept_NK, weight_NK.to(out.dtype.element_ty), mask=real_N[:, None])
