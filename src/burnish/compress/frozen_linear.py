"""A linear whose weight is frozen in a small format and stands there dense only while it is multiplied.

What trains on it is an adapter or whatever comes before it: the backward pass rebuilds the weight and gives the input's
gradient, exact for the weights that the format stands for, whatever ran in between. Formats are in `nf4_linear` and
`int8_frozen`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# N tokens (all leading dimensions of x), I in features, O out features


class FrozenLinear(nn.Module):
    """y = x W' + b, W in a format of the subclass, which registers buffers and gives `dequantized`.

    Args:
        in_features: width of x.
        out_features: width of y.
        bias: whether there is one.
        device, dtype: of the bias.

    Attributes:
        kept_dtypes: names of buffers that a cast of the model must not touch.
    """

    kept_dtypes: tuple[str, ...] = ()
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )

    def quantize_(self, weight_OI: Tensor, *, name: str = "weight") -> None:
        """Take a dense weight, rounded, in place; raises CompressionError for NaN or infinite entries."""
        raise NotImplementedError

    def dequantized(self, dtype: torch.dtype, *, out_OI: Tensor | None = None) -> Tensor:
        """The weight that the layer stands for, dense: (out, in), each rounded once from float32.

        Args:
            out_OI: of that dtype, to be filled and returned instead of a new tensor; rows may lie apart.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) in any float dtype to (..., out), in x's dtype or autocast's; gradients reach x only."""
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        y: Tensor = _FrozenProduct.apply(x, self, dtype)  # pyright: ignore[reportAssignmentType]
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        """Move with the model, but keep the scales' dtype: a cast of the model must not change its weights."""
        kept = {name: tensor for name in self.kept_dtypes if (tensor := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self


def frozen_linears(model: nn.Module) -> dict[str, FrozenLinear]:
    """The frozen linears of a model by name; under an adapter the name ends in ".base"."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


class _FrozenProduct(torch.autograd.Function):
    """x W' + b whose backward rebuilds W; neither x nor W is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer, ctx.dtype, ctx.x_dtype = layer, dtype, x.dtype
        bias_O = None if layer.bias is None else layer.bias.to(dtype)
        return F.linear(x.to(dtype), layer.dequantized(dtype), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grads[0].to(ctx.dtype) @ ctx.layer.dequantized(ctx.dtype)).to(ctx.x_dtype)
        return grad_x, None, None
