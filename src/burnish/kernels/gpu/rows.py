"""Row-wise kernels: residual sum with RMSNorm, and the activated gate times up.

Shapes: T tokens, D hidden, I intermediate.
"""

# Launch options are no parameters of the kernels.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from burnish.kernels.gpu.attention import _tanh
from burnish.kernels.gpu.support import padded_width

GATES = {"silu": 0, "gelu_tanh": 1, "relu": 2}
_GATE_COLUMNS = 1024


def add_rmsnorm(
    x_TD: Tensor, added_TD: Tensor | None, weight_D: Tensor, *, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """The sum x + added, rounded to x's dtype, and its norm as `models.decoder.RMSNorm` computes it.

    Zhang and Sennrich, 2019, arXiv:1910.07467; statistics are float32.

    Args:
        added_TD: None leaves x as it is, and the sum returned is x itself.
        offset: of the weight; when it is not 0 the product with the weight is float32 as well.
    """
    num_tokens, width = x_TD.shape
    normed_TD = torch.empty_like(x_TD)
    sum_TD = x_TD if added_TD is None else torch.empty_like(x_TD)
    columns = padded_width(width)
    _add_rmsnorm[(num_tokens,)](
        x_TD,
        x_TD if added_TD is None else added_TD,
        sum_TD,
        normed_TD,
        weight_D,
        width,
        eps,
        offset,
        ADD=added_TD is not None,
        OFFSET=offset != 0.0,
        COLUMNS=columns,
        num_warps=4 if columns <= 2048 else 8,
    )
    return sum_TD, normed_TD


def gated(gate_up_TX: Tensor, *, activation: str) -> Tensor:
    """activation(gate) * up, (T, I), from the two side by side, (T, 2 I) and contiguous; activations of `GATES`."""
    num_tokens, double = gate_up_TX.shape
    inner = double // 2
    out_TI = gate_up_TX.new_empty((num_tokens, inner))
    _gated[num_tokens, triton.cdiv(inner, _GATE_COLUMNS)](
        gate_up_TX, out_TI, inner, ACTIVATION=GATES[activation], COLUMNS=_GATE_COLUMNS, num_warps=4
    )
    return out_TI


@triton.jit
def _add_rmsnorm(
    x,
    added,
    total,
    normed,
    weight,
    width,
    eps,
    offset,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, COLUMNS)
    real = columns < width
    x_D = tl.load(x + row + columns, mask=real, other=0.0)
    if ADD:
        x_D = (x_D.to(tl.float32) + tl.load(added + row + columns, mask=real, other=0.0).to(tl.float32)).to(x_D.dtype)
        tl.store(total + row + columns, x_D, mask=real)
    wide_D = x_D.to(tl.float32)
    wide_D = wide_D * (1.0 / tl.sqrt(tl.sum(wide_D * wide_D, axis=0) / width + eps))
    weight_D = tl.load(weight + columns, mask=real, other=0.0).to(tl.float32)
    if OFFSET:  # noqa: SIM108
        wide_D = wide_D * (weight_D + offset)
    else:
        # Rounded before the weight, as the models were trained.
        wide_D = wide_D.to(x_D.dtype).to(tl.float32) * weight_D
    tl.store(normed + row + columns, wide_D.to(x_D.dtype), mask=real)


@triton.jit
def _gated(gate_up, out, inner, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = columns < inner
    gate = tl.load(gate_up + row * 2 * inner + columns, mask=real, other=0.0)
    up = tl.load(gate_up + row * 2 * inner + inner + columns, mask=real, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    if ACTIVATION == 0:
        # Below -80 the result is 0 in every 16-bit format and the exponential would overflow.
        x = x / (1.0 + tl.exp(-tl.maximum(x, -80.0)))
    elif ACTIVATION == 1:
        x = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        x = tl.where(x <= 0, 0.0, x)
    tl.store(out + row * inner + columns, (x.to(gate.dtype).to(tl.float32) * up).to(gate.dtype), mask=real)
