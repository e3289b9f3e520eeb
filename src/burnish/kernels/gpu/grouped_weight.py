"""Weights of 4 or 8 bits as the GPU kernels read them, and packing into that layout with plain torch.

8 bits: one signed integer per weight. 4 bits: two unsigned ones per byte, in chunks of 32 columns whose first 16 are
the low halves and whose last 16 the high halves of 16 bytes, so that both halves meet consecutive activations.

Columns are sorted by group, and every group is filled up to a multiple of a chunk.

Shapes: N out features, K in features, G groups, Q columns as kept (G times the filled width of a group).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32
HALF = CHUNK // 2
_WIDEST = 128


@dataclass(frozen=True, kw_only=True)
class GroupedWeight:
    """One weight.

    Attributes:
        codes: 8 bits: (N, Q) int8; 4 bits: (N, Q / 2) uint8.
        scales: (G, N), float16 or float32.
        zeros: (G, N) uint8, for 4 bits; None for 8, which are centred.
        group_width: columns of a group as kept: a multiple of 32.
        column_order: (Q,) int64: which of x's columns meets each kept one, K (a column of zeros) where it is filling;
            None where they are x's own in order, and filling at the end only.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    in_features: int
    group_width: int
    bits: int
    column_order: Tensor | None

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def num_columns(self) -> int:
        """Q."""
        return self.codes.shape[1] * (8 // self.bits)

    @property
    def block_columns(self) -> int:
        """Columns that a kernel takes at once: they divide a group."""
        width = _WIDEST
        while self.group_width % width:
            width //= 2
        return width

    def arranged(self, x_MK: Tensor) -> Tensor:
        """x as the kept columns want it: itself, or (M, Q)."""
        if self.column_order is None:
            return x_MK
        return F.pad(x_MK, (0, 1)).index_select(1, self.column_order)


def pack_grouped_weight(
    ints_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None, groups_K: Tensor, *, bits: int
) -> GroupedWeight:
    """Lay a weight out.

    Args:
        ints_NK: 4 bits: uint8 0..15; 8 bits: int8, centred on 0.
        zeros_NG: zero points, uint8; for 4 bits only.
        groups_K: the group of each column.
    """
    assert (bits == 4) == (zeros_NG is not None)
    num_groups = scales_NG.shape[1]
    counts_G = torch.bincount(groups_K.long(), minlength=num_groups)
    width = -(-int(counts_G.max()) // CHUNK) * CHUNK
    in_features = ints_NK.shape[1]
    sorted_K = torch.argsort(groups_K, stable=True)
    starts_G = torch.cumsum(counts_G, 0) - counts_G
    within_K = torch.arange(in_features, device=groups_K.device) - starts_G[groups_K[sorted_K].long()]
    kept_K = groups_K[sorted_K].long() * width + within_K
    order_Q = torch.full((num_groups * width,), in_features, dtype=torch.int64, device=ints_NK.device)
    order_Q[kept_K] = sorted_K
    in_order = bool((order_Q[:in_features] == torch.arange(in_features, device=order_Q.device)).all())
    # Filling: whatever it holds meets a zero of x.
    kept_NQ = F.pad(ints_NK, (0, 1)).index_select(1, order_Q)
    if bits == 4:
        halves = kept_NQ.view(kept_NQ.shape[0], -1, 2, HALF)
        kept_NQ = (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)
    return GroupedWeight(
        codes=kept_NQ.contiguous(),
        scales=scales_NG.t().contiguous(),
        zeros=None if zeros_NG is None else zeros_NG.t().contiguous(),
        in_features=in_features,
        group_width=width,
        bits=bits,
        column_order=None if in_order else order_Q,
    )


def join_grouped_weights(weights: list[GroupedWeight]) -> GroupedWeight | None:
    """One weight whose outputs are those of all, one after the other; None where their columns differ."""
    first = weights[0]
    for other in weights[1:]:
        same = (other.bits, other.group_width, other.num_columns, other.scales.dtype) == (
            first.bits,
            first.group_width,
            first.num_columns,
            first.scales.dtype,
        )
        orders = (first.column_order, other.column_order)
        if not same or (orders[0] is None) != (orders[1] is None):
            return None
        if orders[0] is not None and orders[1] is not None and not torch.equal(orders[0], orders[1]):
            return None
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    return GroupedWeight(
        codes=torch.cat([weight.codes for weight in weights]),
        scales=torch.cat([weight.scales for weight in weights], dim=1),
        zeros=torch.cat(zeros, dim=1) if zeros else None,
        in_features=first.in_features,
        group_width=first.group_width,
        bits=first.bits,
        column_order=first.column_order,
    )
