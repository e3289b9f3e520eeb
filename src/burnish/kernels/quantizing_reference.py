"""Second moments of calibration inputs in plain torch: what runs without matrix tiles, and their twin."""

from __future__ import annotations

from torch import Tensor

# N tokens (rows), I in features

STRIP = 512
"""Features whose products with all before them are one call: nearly half of the square is left out."""


def add_moments(x_NI: Tensor, total_II: Tensor) -> None:
    """Add x' x to the lower triangle of `total_II`, (I, I) float32; what stands above it is of no use.

    Args:
        x_NI: any float dtype; multiplied in float32.
    """
    x_NI = x_NI.float()
    for first in range(0, x_NI.shape[1], STRIP):
        last = min(first + STRIP, x_NI.shape[1])
        total_II[first:last, :last].addmm_(x_NI[:, first:last].t(), x_NI[:, :last])


def mirrored(total_II: Tensor) -> Tensor:
    """The symmetric matrix of which `total_II` has the lower triangle, in place."""
    below_II = total_II.tril_().tril(-1)
    return total_II.add_(below_II.t())
