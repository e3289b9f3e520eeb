"""Going over a quantized weight again: each scale, then each integer, is set to what is best given all the others.

GPTQ decides every column once, before it knows what the later ones become. Coordinate descent on the same objective,
(Q - W) H (Q - W)', starts from its answer and never makes it worse (Behdin et al., 2023, arXiv:2309.01885). Rows are
independent; a sweep costs about what GPTQ itself does.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from burnish.compress.quantized_weight import SCALE_DTYPE, QuantizedWeight

# O out features, I in features, G groups, C columns of one group or run

RUN = 32
"""Columns between two products with the whole Hessian."""


def refine_weight(
    weight: Tensor, hessian: Tensor, quantized: QuantizedWeight, *, sweeps: int, damping: float = 0.01
) -> QuantizedWeight:
    """Lower the error of a quantized weight on its own grid; zero points and groups stay.

    Args:
        weight: (out, in), what is to be approximated; not modified.
        hessian: (in, in), mean or sum of x x'; not modified.
        quantized: where to start; not modified.
        sweeps: passes over scales and integers at most; fewer when one changes nothing.
        damping: share of the mean diagonal added to the diagonal, as in `gptq.quantize_weight`.
    """
    state = _Descent(weight, hessian, quantized, damping)
    for _ in range(sweeps):
        state.refit_scales()
        if not state.sweep():
            break
    return state.result(quantized)


class _Descent:
    """Integers, scales and the error they leave, columns as rows; the error is kept up to date."""

    def __init__(self, weight: Tensor, hessian: Tensor, quantized: QuantizedWeight, damping: float) -> None:
        self._hessian_II = hessian.float().clone()
        diagonal_I = self._hessian_II.diagonal()
        mean = float(diagonal_I.mean())
        dead_I = diagonal_I <= 0
        diagonal_I += damping * mean
        diagonal_I[dead_I] = mean if mean > 0 else 1.0
        self._pivots = diagonal_I.tolist()
        self._group_of = quantized.g_idx.long()
        self._scales_GO = quantized.scales.float().t().contiguous()
        self._zeros_GO = quantized.zeros.float().t().contiguous()
        self._largest = (1 << quantized.bits) - 1
        # Levels are centred: integers less the zero point of their group.
        self._levels_IO = quantized.ints.float().t() - self._zeros_GO[self._group_of]
        self._error_IO = self._levels_IO * self._scales_GO[self._group_of] - weight.detach().float().t()

    def refit_scales(self) -> None:
        """Set each group's scales to the least squares answer for the integers that are there."""
        for group in range(self._scales_GO.shape[0]):
            columns_C = (self._group_of == group).nonzero()[:, 0]
            if not len(columns_C):
                continue
            rows_CI = self._hessian_II[columns_C]
            levels_CO = self._levels_IO[columns_C]
            slope_O = (levels_CO * (rows_CI @ self._error_IO)).sum(dim=0)
            bend_O = (levels_CO * (rows_CI[:, columns_C] @ levels_CO)).sum(dim=0)
            scale_O = self._scales_GO[group]
            wanted_O = (scale_O - slope_O / torch.where(bend_O > 0, bend_O, 1.0)).to(SCALE_DTYPE).float()
            step_O = wanted_O - scale_O
            # Rounding to float16 may overshoot, and a scale stays a positive normal number.
            better_O = step_O * (2.0 * slope_O + step_O * bend_O) < 0
            better_O &= (wanted_O > torch.finfo(SCALE_DTYPE).smallest_normal) & torch.isfinite(wanted_O)
            step_O = torch.where(better_O, step_O, 0.0)
            scale_O += step_O
            self._error_IO[columns_C] += levels_CO * step_O

    def sweep(self) -> bool:
        """Set each integer to its best value given all the others, column by column; whether any changed."""
        changed = torch.zeros((), dtype=torch.bool, device=self._error_IO.device)
        groups = self._group_of.tolist()
        for start in range(0, len(groups), RUN):
            end = min(start + RUN, len(groups))
            slopes_CO = self._hessian_II[start:end] @ self._error_IO
            for column in range(start, end):
                slope_O, group = slopes_CO[column - start], groups[column]
                scale_O, zero_O = self._scales_GO[group], self._zeros_GO[group]
                level_O = self._levels_IO[column]
                best_O = (level_O - slope_O / (self._pivots[column] * scale_O)).round_().add_(zero_O)
                best_O.clamp_(0, self._largest).sub_(zero_O)
                step_O = (best_O - level_O).mul_(scale_O)
                changed |= step_O.any()
                level_O.copy_(best_O)
                self._error_IO[column] += step_O
                if column + 1 < end:
                    slopes_CO[column + 1 - start :].addr_(self._hessian_II[column + 1 : end, column], step_O)
        return bool(changed)

    def result(self, quantized: QuantizedWeight) -> QuantizedWeight:
        ints_IO = self._levels_IO + self._zeros_GO[self._group_of]
        return replace(
            quantized,
            ints=ints_IO.round_().to(torch.uint8).t().contiguous(),
            scales=self._scales_GO.t().to(SCALE_DTYPE).contiguous(),
        )
