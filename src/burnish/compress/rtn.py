"""Round to nearest: each weight to the closest point of its group's grid, no calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.compress.quantized_weight import (
    SCALE_DTYPE,
    QuantizedWeight,
    check_weight,
    fit_grid,
    group_width,
    trivial_g_idx,
)

# O out features, I in features, G groups


def quantize_weight(
    weight: Tensor,
    *,
    bits: int,
    group_size: int = -1,
    symmetric: bool = True,
    scale_search: bool = False,
    importance: Tensor | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize one linear weight by rounding.

    Args:
        weight: (out_features, in_features), any float dtype; not modified.
        bits: 2, 3, 4 or 8.
        group_size: input features per scale; -1 is all; the last group may be short.
        symmetric: fixed middle zero point.
        scale_search: fit each scale by least squared error.
        importance: (in_features,), float32, what squared errors count for in that search; None counts all alike.
        name: the layer, for messages.

    Raises:
        CompressionError: NaN or infinite weights, or a scale beyond float16.
    """
    check_weight(weight, name)
    weight_OI = weight.detach().float()
    in_features = weight_OI.shape[1]
    width = group_width(in_features, group_size)
    ints_OI = torch.empty(weight_OI.shape, dtype=torch.uint8, device=weight.device)
    scales, zeros = [], []
    for start in range(0, in_features, width):
        columns = slice(start, min(start + width, in_features))
        grid = fit_grid(
            weight_OI[:, columns],
            bits=bits,
            symmetric=symmetric,
            search=scale_search,
            importance_N=None if importance is None else importance[columns],
            name=name,
        )
        ints_OI[:, columns] = grid.to_ints(weight_OI[:, columns]).to(torch.uint8)
        scales.append(grid.scale)
        zeros.append(grid.zero)
    return QuantizedWeight(
        ints=ints_OI,
        scales=torch.stack(scales, dim=1).to(SCALE_DTYPE),
        zeros=torch.stack(zeros, dim=1).to(torch.uint8),
        g_idx=trivial_g_idx(in_features, group_size).to(weight.device),
        bits=bits,
        group_size=group_size,
    )
