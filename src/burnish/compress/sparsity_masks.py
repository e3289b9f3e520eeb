"""Which entries of a matrix of scores are lowest: in all of it, in each row, in each run of m columns of a row.

Masks are True where a weight is to become zero. Of equal scores the first counts as lower, so that the number of zeros
is exact for constant weights too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.errors import CompressionError

# O out features, I in features, M columns of one run of the pattern


def share_of(count: int, share: float) -> int:
    """The whole number nearest to a share of `count`."""
    return int(count * share + 0.5)


def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest entries of the whole tensor: its shape, bool."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    order = torch.sort(scores.flatten(), stable=True).indices
    mask[order[:count]] = True
    return mask.view(scores.shape)


def lowest_in_rows(scores_OI: Tensor, share: float) -> Tensor:
    """The same share of lowest entries in every row, to a whole number; exact over all rows: (out, in), bool."""
    out_features, in_features = scores_OI.shape
    ends_O = (torch.arange(out_features + 1, dtype=torch.float64, device=scores_OI.device) * in_features * share).add_(
        0.5
    )
    counts_O = ends_O.floor_().diff()
    order_OI = torch.sort(scores_OI, dim=1, stable=True).indices
    wanted_OI = torch.arange(in_features, device=scores_OI.device) < counts_O[:, None]
    return torch.zeros_like(wanted_OI).scatter_(1, order_OI, wanted_OI)


def lowest_in_runs(scores_OI: Tensor, pattern: tuple[int, int]) -> Tensor:
    """All but the n highest of every m consecutive columns of each row: (out, in), bool; False in the ragged end."""
    keep, width = pattern
    out_features, in_features = scores_OI.shape
    whole = in_features // width * width
    mask_OI = torch.zeros(scores_OI.shape, dtype=torch.bool, device=scores_OI.device)
    runs_RM = scores_OI[:, :whole].reshape(-1, width)
    mask_OI[:, :whole] = lowest_in_rows(runs_RM, (width - keep) / width).view(out_features, whole)
    return mask_OI


def ragged_columns(in_features: int, pattern: tuple[int, int] | None) -> int:
    """Input features at the end of each row that fill no whole run of the pattern, and stay dense."""
    return 0 if pattern is None else in_features % pattern[1]


def feature_energy(hessian_II: Tensor, name: str) -> Tensor:
    """Mean square of each input feature: (in,), float32.

    Raises:
        CompressionError: NaN or infinite activations.
    """
    energy_I = hessian_II.diagonal().float()
    if not bool(torch.isfinite(energy_I).all()):
        raise CompressionError(
            f"the calibration activations of {name} are NaN or infinite",
            remedy="The parent overflows on this text; run it in float32 or bfloat16, or change the calibration text",
        )
    return energy_I.clamp_min(0.0)
