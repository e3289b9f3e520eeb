"""DoRA's share of the arithmetic: the lengths of a weight's rows under an adapter.

Liu et al., 2024, arXiv:2402.09353: W' = m * (W + scale * B A) / ||W + scale * B A||, with a norm per output feature
(the paper's columns) that the gradient does not pass through.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from burnish.errors import ConfigError

# I in features, O out features, R rank

SLAB_WEIGHTS = 1 << 18
"""Weights of the sum that exist at once."""


def dense_weight(base: nn.Module) -> Tensor:
    """The weight that a linear stands for, dense: (out, in); its own where it is dense already.

    Raises:
        ConfigError: a module that cannot give it.
    """
    if isinstance(base, nn.Linear):
        return base.weight.detach()
    for give in ("dequantized", "dequantize"):
        method = getattr(base, give, None)
        if method is not None:
            return method(dtype=torch.float32)
    raise ConfigError("DoRA needs a linear that can give its weight", got=type(base).__name__)


def row_norms(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, *, scale: float) -> Tensor:
    """||W + scale * B A|| of each row: (out,), float32, never 0; a few rows of the sum exist at a time."""
    rows = max(1, SLAB_WEIGHTS // max(1, weight_OI.shape[1]))
    norms_O = torch.empty(weight_OI.shape[0], dtype=torch.float32, device=weight_OI.device)
    a_RI, b_OR = a_RI.float(), b_OR.float()
    for start in range(0, weight_OI.shape[0], rows):
        slab = slice(start, start + rows)
        norms_O[slab] = torch.addmm(weight_OI[slab].float(), b_OR[slab], a_RI, alpha=scale).norm(dim=1)
    return norms_O.clamp_min_(torch.finfo(torch.float32).tiny)
