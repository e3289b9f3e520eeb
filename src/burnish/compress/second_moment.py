"""The second moment of what a linear reads, summed batch by batch: half of a symmetric matrix until it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from burnish.kernels import quantizing_reference
from burnish.kernels.cpu.quantizing import quantizing_kernels

# N tokens, I in features


class SecondMoment:
    """Mean of x x' over tokens, float32.

    Inputs in bfloat16 are multiplied as they are, where the processor has matrix tiles, and in float32 elsewhere: the
    products are exact either way, and the sums float32.

    Args:
        linear: what reads them.
    """

    def __init__(self, linear: nn.Linear) -> None:
        device = linear.weight.device
        self.count = 0
        self._total_II = torch.zeros(linear.in_features, linear.in_features, device=device)
        self._kernels = quantizing_kernels(device)

    def add(self, x_NI: Tensor) -> None:
        """Take in more tokens."""
        self.count += x_NI.shape[0]
        if self._kernels is not None and self._kernels.has_moments and x_NI.dtype == torch.bfloat16:
            self._kernels.add_moments(x_NI, self._total_II)
        else:
            quantizing_reference.add_moments(x_NI, self._total_II)

    def mean(self) -> Tensor:
        """(I, I); what was summed becomes it, so that it is asked for once."""
        return quantizing_reference.mirrored(self._total_II).div_(self.count)
