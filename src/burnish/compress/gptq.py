"""GPTQ: quantize columns one after another, each column's error corrected in those that follow.

Frantar et al., 2022, arXiv:2210.17323, Algorithm 1. The inverse Hessian's upper Cholesky factor comes from one
Cholesky of the Hessian in reversed order: with P the reversal and P H P = M M', the factor is the inverse of P M P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.compress.quantized_weight import (
    SCALE_DTYPE,
    SHRINKS,
    Grid,
    QuantizedWeight,
    check_weight,
    fit_grid,
    group_width,
    trivial_g_idx,
)
from burnish.errors import CompressionError
from burnish.kernels.cpu.quantizing import quantizing_kernels

# O out features, I in features (in the order of quantization), B columns of one block, C columns of one run

RUN = 32
"""Columns between two updates inside a block: rank-one updates stay in cache, the rest is matrix products."""


@dataclass(frozen=True, kw_only=True)
class InverseHessian:
    """What one input's Hessian gives every linear that reads it.

    Attributes:
        factor_II: upper triangular U with U' U the inverse of the damped Hessian, (in, in), float32, in the order of
            quantization.
        order_I: (in,), the input features in that order; None is the plain one.
    """

    factor_II: Tensor
    order_I: Tensor | None


def invert_hessian(
    hessian: Tensor, *, damping: float = 0.01, activation_order: bool = False, name: str = "weight"
) -> InverseHessian:
    """Damp, order and invert a Hessian; arguments and errors as in `quantize_weight` and `inverse_factor`."""
    order_I = torch.argsort(hessian.diagonal(), descending=True, stable=True) if activation_order else None
    return InverseHessian(
        factor_II=inverse_factor(hessian, damping=damping, order_I=order_I, name=name), order_I=order_I
    )


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int,
    group_size: int = -1,
    symmetric: bool = True,
    damping: float = 0.01,
    activation_order: bool = False,
    scale_search: bool = False,
    block_size: int = 128,
    inverse: InverseHessian | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize one linear weight column by column with GPTQ.

    Input features that calibration never excited (a zero on the Hessian's diagonal) are rounded to nearest: nothing can
    be said about their errors, and nothing is corrected for them.

    Args:
        weight: (out_features, in_features), any float dtype; not modified.
        hessian: (in_features, in_features), sum or mean of x x' over calibration tokens; any scale; not modified.
        bits: 2, 3, 4 or 8.
        group_size: input features per scale; -1 is all; the last group may be short.
        symmetric: fixed middle zero point.
        damping: share of the mean diagonal added to the diagonal.
        activation_order: columns in order of falling Hessian diagonal (ties: lower column first); groups follow it.
        scale_search: fit each scale by least squared error, columns weighted by what their errors cost.
        block_size: columns between two updates of all the rest where the compiled kernels do not run; does not change
            the result beyond rounding.
        inverse: of this Hessian, where other linears share it; its damping and order count then.
        name: the layer, for messages.

    Raises:
        CompressionError: NaN or infinite weights or Hessian, shapes that do not fit, a Hessian that is not positive
            definite after damping, a scale beyond float16.
    """
    check_weight(weight, name)
    in_features = weight.shape[1]
    if hessian.shape != (in_features, in_features):
        raise CompressionError(
            f"the Hessian of {name} does not fit", got=tuple(hessian.shape), expected=(in_features, in_features)
        )
    width = group_width(in_features, group_size)
    if inverse is None:
        inverse = invert_hessian(hessian, damping=damping, activation_order=activation_order, name=name)
    order_I, factor_II = inverse.order_I, inverse.factor_II
    # What one unit of squared error in a column costs once the columns after it have made up for what they can.
    importance_I = factor_II.diagonal().square().reciprocal() if scale_search else None
    weight_OI = weight.detach().float()
    if order_I is not None:
        weight_OI = weight_OI[:, order_I]
    kernels = quantizing_kernels(weight.device)
    if kernels is None:
        ints_OI, scales_OG, zeros_OG = quantize_columns(
            weight_OI,
            factor_II,
            bits=bits,
            width=width,
            symmetric=symmetric,
            importance_I=importance_I,
            block_size=block_size,
            name=name,
        )
    else:
        ints_OI, scales_OG, zeros_OG = kernels.gptq(
            weight_OI,
            factor_II,
            bits=bits,
            width=width,
            symmetric=symmetric,
            shrinks=SHRINKS if scale_search else (),
            importance_I=importance_I,
            name=name,
        )

    g_idx = trivial_g_idx(in_features, group_size).to(weight.device)
    if order_I is not None:
        back_I = torch.argsort(order_I)
        ints_OI, g_idx = ints_OI[:, back_I], g_idx[back_I]
    return QuantizedWeight(
        ints=ints_OI,
        scales=scales_OG.to(SCALE_DTYPE),
        zeros=zeros_OG,
        g_idx=g_idx,
        bits=bits,
        group_size=group_size,
    )


def quantize_columns(
    weight_OI: Tensor,
    factor_II: Tensor,
    *,
    bits: int,
    width: int,
    symmetric: bool,
    importance_I: Tensor | None = None,
    block_size: int = 128,
    name: str = "weight",
) -> tuple[Tensor, Tensor, Tensor]:
    """The columns in plain torch; twin of `kernels/cpu/quantizing.py`'s `gptq`, and what runs without it or on a GPU.

    Args:
        weight_OI: float32, columns in the order of quantization; not modified.
        width: columns that share a scale.
        importance_I: search for each scale, columns weighted so; None takes the whole range.

    Returns:
        ints (O, I) uint8, scales (O, G) float32 that float16 holds, zeros (O, G) uint8.
    """
    # Columns as rows, so that each one is contiguous.
    out_features, in_features = weight_OI.shape
    weight_IO = weight_OI.t().contiguous()
    if weight_IO.data_ptr() == weight_OI.data_ptr():
        weight_IO = weight_IO.clone()
    ints_IO = torch.empty(in_features, out_features, dtype=torch.uint8, device=weight_OI.device)
    grids: list[Grid] = []
    # A block holds whole groups, so that a group's grid is fitted to weights that carry every correction so far.
    step = block_size if width == in_features else max(width, block_size // width * width)
    for start in range(0, in_features, step):
        end = min(start + step, in_features)
        block_BO = weight_IO[start:end]
        errors_BO = torch.empty_like(block_BO)
        for first, last in _runs(start, end, width):
            if first % width == 0:
                group = slice(first, min(first + width, in_features))
                grids.append(
                    fit_grid(
                        weight_IO[group].t(),
                        bits=bits,
                        symmetric=symmetric,
                        search=importance_I is not None,
                        importance_N=None if importance_I is None else importance_I[group],
                        name=name,
                    )
                )
            run = slice(first, last)
            ints_IO[run] = _quantize_run(
                weight_IO[run], factor_II[run, run], grids[-1], errors_CO=errors_BO[first - start : last - start]
            )
            if last < end:
                weight_IO[last:end].addmm_(
                    factor_II[run, last:end].t(), errors_BO[first - start : last - start], alpha=-1.0
                )
        if end < in_features:
            weight_IO[end:].addmm_(factor_II[start:end, end:].t(), errors_BO, alpha=-1.0)
    return (
        ints_IO.t().contiguous(),
        torch.stack([grid.scale for grid in grids], dim=1),
        torch.stack([grid.zero for grid in grids], dim=1).to(torch.uint8),
    )


def inverse_factor(hessian: Tensor, *, damping: float, order_I: Tensor | None = None, name: str = "weight") -> Tensor:
    """The upper triangular U with U' U = inverse of the damped Hessian.

    Args:
        hessian: (in, in), positive semi-definite; not modified.
        damping: share of the mean diagonal added to the diagonal.
        order_I: (in,), an order of the columns to apply first.
        name: the layer, for messages.

    Returns:
        (in, in), float32.

    Raises:
        CompressionError: NaN or infinite entries, or not positive definite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise CompressionError(
            f"the calibration activations of {name} are NaN or infinite",
            remedy="The parent overflows on this text; run it in float32 or bfloat16, or change the calibration text",
        )
    damped_II = hessian.float()
    damped_II = damped_II[order_I][:, order_I] if order_I is not None else damped_II.clone()
    diagonal_I = damped_II.diagonal()
    dead_I = diagonal_I <= 0
    mean = float(diagonal_I.mean())
    diagonal_I += damping * mean
    diagonal_I[dead_I] = mean if mean > 0 else 1.0
    reversed_II = damped_II.flip(0, 1)
    lower_II, info = torch.linalg.cholesky_ex(reversed_II)
    if int(info) != 0:
        lower_II, info = torch.linalg.cholesky_ex(reversed_II.double())
    if int(info) != 0:
        raise CompressionError(
            f"the damped Hessian of {name} is not positive definite",
            got=f"damping {damping}",
            remedy="Raise the damping (0.05, 0.1) or use more calibration text",
        )
    upper_II = lower_II.flip(0, 1)
    identity_II = torch.eye(upper_II.shape[0], dtype=upper_II.dtype, device=upper_II.device)
    return torch.linalg.solve_triangular(upper_II, identity_II, upper=True).float().contiguous()


def _runs(start: int, end: int, width: int) -> list[tuple[int, int]]:
    """Runs of at most RUN columns that begin anew where a group does."""
    runs = []
    first = start
    while first < end:
        last = min(first + RUN, end, (first // width + 1) * width)
        runs.append((first, last))
        first = last
    return runs


def _quantize_run(weight_CO: Tensor, factor_CC: Tensor, grid: Grid, *, errors_CO: Tensor) -> Tensor:
    """Quantize consecutive columns of one group; fills errors_CO, changes weight_CO, returns ints (columns, out)."""
    ints_CO = torch.empty(weight_CO.shape, dtype=torch.uint8, device=weight_CO.device)
    inverse_scale_O = grid.scale.reciprocal()
    pivots = factor_CC.diagonal().tolist()
    for column, pivot in enumerate(pivots):
        value_O = weight_CO[column]
        level_O = (value_O * inverse_scale_O).round_().add_(grid.zero).clamp_(0, grid.max_int)
        ints_CO[column] = level_O
        error_O = level_O.sub_(grid.zero).mul_(grid.scale).sub_(value_O).div_(-pivot)
        errors_CO[column] = error_O
        if column + 1 < len(pivots):
            weight_CO[column + 1 :].addr_(factor_CC[column, column + 1 :], error_O, alpha=-1.0)
    return ints_CO
