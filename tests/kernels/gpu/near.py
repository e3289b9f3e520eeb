"""Random tensors, and equality within what one rounding explains."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.kernels.gpu.support import interpreted

# The interpreter cuts float32 to bfloat16 off where a card rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# The interpreter multiplies bfloat16 matrices as if their bits were integers.
MATRIX_DTYPES = [torch.float32, torch.float16, *([] if interpreted() else [torch.bfloat16])]


def assert_near(found: Tensor, expected: Tensor, *, dtype: torch.dtype) -> None:
    """Equal within what one rounding to `dtype` explains, NaN at the same places."""
    scale = expected.float().nan_to_num().abs().max().item() if expected.numel() else 0.0
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=tolerance, atol=tolerance * max(scale, 1e-6), equal_nan=True
    )


def normal(*shape: int, seed: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)
