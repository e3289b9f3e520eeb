"""The forward and backward of one linear with a low-rank adapter, as few matrix products as it takes.

Kept for the backward pass: the input and references to the weights, nothing else that grows with the number of tokens
but the (tokens, rank) projection. The frozen base weight never gets a gradient. Which modules carry an adapter, and
how adapters are stored, is not decided here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# N tokens (all leading dimensions flattened), I in features, O out features, R rank


def folding_pays(num_tokens: int, in_features: int, out_features: int) -> bool:
    """Whether building W + scale * B A once costs less than pushing every token through A and B.

    Folding costs I * O * R multiplications, the separate branch N * (I + O) * R; the branch also reads and writes the
    activations again, so folding is taken from the point where both cost the same.
    """
    return num_tokens * (in_features + out_features) >= in_features * out_features


def lora_linear(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    *,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Compute x W^T + bias + scale * (x A^T) B^T with gradients for x, A and B only.

    Args:
        x: (..., in_features).
        weight_OI: frozen dense weight, any float dtype; cast to `dtype` when it differs.
        bias_O: frozen bias or None.
        a_RI, b_OR: the adapter's float32 factors.
        scale: alpha / rank, or alpha / sqrt(rank).
        dtype: compute dtype. In float32 the factors are folded into the weight where that is cheaper; in lower
            precision never, because a sum rounded to 8 bits of mantissa would swallow a small adapter.
    """
    x_NI = x.reshape(-1, x.shape[-1])
    out_NO = _LoraLinear.apply(x_NI, weight_OI, bias_O, a_RI, b_OR, scale, dtype)
    return out_NO.view(*x.shape[:-1], out_NO.shape[-1])


def _folded(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight_OI, b_OR, a_RI, alpha=scale)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.x_dtype, ctx.scale, ctx.dtype = x_NI.dtype, scale, dtype
        x_NI = x_NI.to(dtype)
        ctx.fold = dtype == torch.float32 and folding_pays(len(x_NI), weight_OI.shape[1], weight_OI.shape[0])
        bias_O = None if bias_O is None else bias_O.to(dtype)
        if ctx.fold:
            ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR)
            weight_OI = _folded(weight_OI.to(dtype), a_RI, b_OR, scale)
            return torch.nn.functional.linear(x_NI, weight_OI, bias_O)
        h_NR = x_NI @ a_RI.to(dtype).t()
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, h_NR)
        out_NO = torch.nn.functional.linear(x_NI, weight_OI.to(dtype), bias_O)
        return out_NO.addmm_(h_NR, b_OR.to(dtype).t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, a_RI, b_OR, *kept = ctx.saved_tensors
        dtype, scale = ctx.dtype, ctx.scale
        grad_NO = grads[0].to(dtype)
        a, b = a_RI.to(dtype), b_OR.to(dtype)
        h_NR = kept[0] if kept else x_NI @ a.t()
        grad_h_NR = grad_NO @ b
        grad_x_NI = None
        if ctx.needs_input_grad[0]:
            if ctx.fold:
                grad_x_NI = grad_NO @ _folded(weight_OI.to(dtype), a, b, scale)
            else:
                grad_x_NI = grad_NO @ weight_OI.to(dtype)
                grad_x_NI.addmm_(grad_h_NR, a, alpha=scale)
            grad_x_NI = grad_x_NI.to(ctx.x_dtype)
        grad_a = grad_b = None
        if ctx.needs_input_grad[3]:
            grad_a = (grad_h_NR.t() @ x_NI).float().mul_(scale)
        if ctx.needs_input_grad[4]:
            grad_b = (h_NR.t() @ grad_NO).t().float().mul_(scale)
        return grad_x_NI, None, None, grad_a, grad_b, None, None
