"""Rounding a weight to small integers group by group, in one pass that is quick enough to do while a model loads.

`rtn` does the same one group at a time, with a finer search. Here all groups of some rows are fitted together, slab by
slab, and the integers go straight into the words that `GroupQuantizedLinear` keeps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.int8_linear import rounded, slab_rows
from burnish.compress.packing import pack
from burnish.compress.quantized_weight import SCALE_DTYPE, check_weight, group_width, num_groups
from burnish.errors import CompressionError

# O out features, I in features, R rows of one slab, G groups, N columns of a group, W words of a row

BITS = 4
LARGEST = (1 << BITS) - 1
PER_WORD = 32 // BITS
SHRINK = (1.0, 0.94, 0.88, 0.82, 0.75)
"""Shares of a group's range that are tried; the one of least squared error is taken."""


def round_groups(weight_OI: Tensor, layer: GroupQuantizedLinear, *, name: str = "weight") -> None:
    """Quantize a weight to 4 bits with a free zero point per group, into the packed tensors of `layer`.

    Each group's range (which includes 0) is cut by every share of `SHRINK` in turn. With G groups the memory needed
    beyond the layer is that of its integers and its scales once more.

    Args:
        weight_OI: (out, in), any float dtype; not modified.
        layer: a packed layer of 4 bits and the same shape; its group size is used.
        name: the layer, for messages.

    Raises:
        CompressionError: NaN or infinite weights, or a scale beyond float16.
    """
    assert layer.bits == BITS
    assert layer.qweight is not None and layer.qzeros is not None and layer.scales is not None  # noqa: PT018
    out_features, in_features = weight_OI.shape
    width, groups = group_width(in_features, layer.group_size), num_groups(in_features, layer.group_size)
    words_OW = torch.zeros(out_features, layer.qweight.shape[0], dtype=torch.int32)
    scales_OG = torch.empty(out_features, groups, dtype=SCALE_DTYPE)
    zeros_OG = torch.empty(out_features, groups, dtype=torch.uint8)
    rows = slab_rows(weight_OI)
    for start in range(0, out_features, rows):
        slab = slice(start, start + rows)
        slab_RI = weight_OI[slab].to(device="cpu", dtype=torch.float32)
        # A short last group is filled up with zeros, which every grid holds exactly: they count for nothing.
        grouped_RGN = _filled(slab_RI, groups * width).unflatten(1, (groups, width))
        ints_RGN, scales_OG[slab], zeros = _fit(grouped_RGN, name)
        zeros_OG[slab] = zeros
        words_OW[slab] = _packed(ints_RGN.flatten(1)[:, :in_features], words_OW.shape[1])
    if not bool(torch.isfinite(scales_OG).all()):
        check_weight(weight_OI, name)
        raise CompressionError(f"{name} has weights too large for float16 scales", expected="less than about 900000")
    stored_OG = (zeros_OG.to(torch.int16) - layer.zero_offset) & LARGEST
    layer.qweight.copy_(words_OW.t())
    layer.qzeros.copy_(pack(stored_OG, BITS).t())
    layer.scales.copy_(scales_OG.t())


def _fit(grouped_RGN: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The integers (R, G, N) float32, scales (R, G) float16 and zero points (R, G) uint8 of least squared error."""
    low_RG, high_RG = grouped_RGN.amin(dim=2).clamp_max_(0.0), grouped_RGN.amax(dim=2).clamp_min_(0.0)
    if not bool(torch.isfinite(high_RG - low_RG).all()):
        check_weight(grouped_RGN.flatten(1), name)
    step_RG = (high_RG - low_RG) / LARGEST
    zero_RG = rounded(-low_RG / torch.where(step_RG > 0, step_RG, 1.0))
    # Zero points are stored less one and readers disagree on what -1 wraps to: such a group gives up one level.
    positive_RG = zero_RG < 1
    zero_RG = torch.where(positive_RG, 1.0, zero_RG)
    step_RG = torch.where(positive_RG, high_RG / (LARGEST - 1), step_RG)
    step_RG = torch.where(step_RG > 0, step_RG, 1.0)
    smallest = torch.finfo(SCALE_DTYPE).tiny * torch.finfo(SCALE_DTYPE).eps
    best_RG = torch.full_like(step_RG, torch.inf)
    best_step_RG = step_RG
    for share in SHRINK:
        # Rounded to what the file holds before the weights are, so that saving loses nothing.
        tried_RG = (step_RG * share).to(SCALE_DTYPE).float().clamp_min_(smallest)
        # On the grid, where its points are 0..15: the error comes out in steps.
        places_RGN = grouped_RGN.mul(tried_RG.reciprocal()[..., None]).add_(zero_RG[..., None])
        missed_RGN = rounded(places_RGN.clone()).clamp_(0, LARGEST).sub_(places_RGN)
        error_RG = torch.linalg.vecdot(missed_RGN, missed_RGN) * tried_RG.square()
        better_RG = error_RG < best_RG
        best_RG = torch.where(better_RG, error_RG, best_RG)
        best_step_RG = torch.where(better_RG, tried_RG, best_step_RG)
    places_RGN = grouped_RGN.mul(best_step_RG.reciprocal()[..., None]).add_(zero_RG[..., None])
    return (
        rounded(places_RGN).clamp_(0, LARGEST),
        best_step_RG.to(SCALE_DTYPE),
        zero_RG.to(torch.uint8),
    )


def _packed(ints_RI: Tensor, num_words: int) -> Tensor:
    """Rows of 4-bit integers, held as float32, as int32 words (R, W): the first integer in the lowest bits."""
    ints_RI = _filled(ints_RI, num_words * PER_WORD)
    # In float32, where it is exact and quicker than shifting bytes.
    return torch.add(ints_RI[:, 0::2], ints_RI[:, 1::2], alpha=1 << BITS).to(torch.uint8).view(torch.int32)


def _filled(rows_RI: Tensor, width: int) -> Tensor:
    """Rows with zeros at their ends."""
    missing = width - rows_RI.shape[1]
    return F.pad(rows_RI, (0, missing)) if missing else rows_RI
