"""A quantized weight as plain integers, and the grid that a group of weights is rounded to.

No algorithm lives here: `rtn` and `gptq` decide what is rounded when; `packing` and `group_linear` store and run it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.errors import CompressionError

# O out features, I in features, G groups, N columns of one group

SCALE_DTYPE = torch.float16
"""What files hold. Scales are rounded to it before the weights are, so that saving loses nothing."""

SEARCH_STEPS = 24
SEARCH_SMALLEST = 0.45
SHRINKS = tuple(1.0 - (1.0 - SEARCH_SMALLEST) * step / SEARCH_STEPS for step in range(1, SEARCH_STEPS + 1))
"""Shares of a group's range that a search for its scale tries, beside the whole."""


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """weight[o, i] = (ints[o, i] - zeros[o, g_idx[i]]) * scales[o, g_idx[i]].

    Attributes:
        ints: (out, in), uint8, each in 0..2**bits - 1.
        scales: (out, groups), float16.
        zeros: (out, groups), uint8, each in 1..2**bits - 1 (0 has no safe form in the common file layout).
        g_idx: (in,), int32, the group of each input feature.
        bits: bits per weight.
        group_size: input features per group; -1 when one group holds all.
    """

    ints: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int
    group_size: int

    def dequantize(self, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights that the integers stand for: (out, in), computed in float32, then rounded to `dtype`."""
        columns = self.g_idx.long()
        centred_OI = self.ints.float() - self.zeros.float().index_select(1, columns)
        return (centred_OI * self.scales.float().index_select(1, columns)).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One group's grid per output feature: scale (out,) float32 of float16 values, zero (out,) float32 of integers."""

    scale: Tensor
    zero: Tensor
    max_int: int

    def to_ints(self, weight_ON: Tensor) -> Tensor:
        """The nearest grid points as float32 integers in 0..max_int, same shape as the weight."""
        scaled = weight_ON / self.scale[:, None]
        return scaled.round_().add_(self.zero[:, None]).clamp_(0, self.max_int)

    def to_weights(self, ints_ON: Tensor) -> Tensor:
        """The weights of the grid points."""
        return (ints_ON - self.zero[:, None]) * self.scale[:, None]


def group_width(in_features: int, group_size: int) -> int:
    """Input features of a full group; -1 and sizes beyond the layer mean all of them."""
    return in_features if group_size == -1 else min(group_size, in_features)


def num_groups(in_features: int, group_size: int) -> int:
    """Groups of one row; the last one may be short."""
    return -(-in_features // group_width(in_features, group_size))


def trivial_g_idx(in_features: int, group_size: int) -> Tensor:
    """g_idx of groups in plain order: (in,), int32."""
    return (torch.arange(in_features) // group_width(in_features, group_size)).to(torch.int32)


def check_weight(weight_OI: Tensor, name: str) -> None:
    """Refuse what no grid can hold.

    Raises:
        CompressionError: not a matrix, empty, or with NaN or infinite entries; names the layer.
    """
    if weight_OI.ndim != 2 or not weight_OI.numel():
        raise CompressionError(
            f"{name} cannot be quantized", got=f"shape {tuple(weight_OI.shape)}", expected="a matrix"
        )
    if bool(torch.isfinite(weight_OI.sum(dtype=torch.float32))):
        return
    # Large finite weights overflow the sum as well.
    bad = int((~torch.isfinite(weight_OI)).sum())
    if bad:
        raise CompressionError(
            f"{name} holds {bad} NaN or infinite weights of {weight_OI.numel()}",
            remedy="The parent model is damaged; evaluate it before compressing it",
        )


def _storable(scale_O: Tensor, name: str) -> Tensor:
    """Scales rounded to what the file holds, never zero."""
    info = torch.finfo(SCALE_DTYPE)
    if float(scale_O.max()) > info.max:
        raise CompressionError(
            f"{name} has weights too large for float16 scales",
            got=float(scale_O.max()),
            expected=f"at most {info.max}",
        )
    return scale_O.to(SCALE_DTYPE).float().clamp_min_(info.smallest_normal * info.eps)


def _whole_range(weight_ON: Tensor, max_int: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero whose grid spans each row's range (and zero)."""
    if symmetric:
        scale_O = weight_ON.abs().amax(dim=1) * (2.0 / max_int)
        zero_O = torch.full_like(scale_O, (max_int + 1) // 2)
    else:
        low_O = weight_ON.amin(dim=1).clamp_max_(0.0)
        high_O = weight_ON.amax(dim=1).clamp_min_(0.0)
        scale_O = (high_O - low_O) / max_int
        zero_O = (-low_O / torch.where(scale_O > 0, scale_O, 1.0)).round_()
        # Files store zero - 1 and readers disagree on what -1 wraps to: an all-positive row gives up one level instead.
        positive_O = zero_O < 1
        zero_O = torch.where(positive_O, 1.0, zero_O)
        scale_O = torch.where(positive_O, high_O / (max_int - 1), scale_O)
    # A row of zeros has any grid; one that is not tiny keeps other readers' arithmetic away from subnormal numbers.
    return torch.where(scale_O > 0, scale_O, 1.0), zero_O


def fit_grid(
    weight_ON: Tensor,
    *,
    bits: int,
    symmetric: bool,
    search: bool = False,
    importance_N: Tensor | None = None,
    name: str = "weight",
) -> Grid:
    """Fit one group's grid, one scale and zero point per output feature.

    Args:
        weight_ON: (out, columns of the group), float32; not modified.
        bits: bits per weight.
        symmetric: zero point in the middle (2**(bits - 1)), the range clipped by half a step on its upper side.
        search: try shrunken ranges and keep the one of least squared error per row.
        importance_N: (columns,), weights of the squared errors in the search; None counts all alike.
        name: the layer, for messages.

    Raises:
        CompressionError: a scale does not fit float16.
    """
    max_int = (1 << bits) - 1
    scale_O, zero_O = _whole_range(weight_ON, max_int, symmetric)
    whole = Grid(scale=_storable(scale_O, name), zero=zero_O, max_int=max_int)
    if not search:
        return whole
    best_scale_O = whole.scale.clone()
    best_O = _squared_error(whole, weight_ON, importance_N)
    for shrink in SHRINKS:
        candidate = Grid(scale=_storable(scale_O * shrink, name), zero=zero_O, max_int=max_int)
        error_O = _squared_error(candidate, weight_ON, importance_N)
        better_O = error_O < best_O
        best_O = torch.where(better_O, error_O, best_O)
        best_scale_O = torch.where(better_O, candidate.scale, best_scale_O)
    return Grid(scale=best_scale_O, zero=zero_O, max_int=max_int)


def _squared_error(grid: Grid, weight_ON: Tensor, importance_N: Tensor | None) -> Tensor:
    difference_ON = grid.to_weights(grid.to_ints(weight_ON)).sub_(weight_ON).square_()
    return difference_ON.sum(dim=1) if importance_N is None else difference_ON @ importance_N
