"""A frozen linear in eight bits: what 8-bit QLoRA trains on.

Weights are rounded row by row as in Dettmers et al., 2022, arXiv:2208.07339; activations stay as they are, so that the
product is that of the rounded weights and needs no outliers apart. `Int8Linear`, which rounds activations as well, is
for inference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from burnish.compress.frozen_linear import FrozenLinear
from burnish.compress.int8_linear import quantize_rows
from burnish.kernels import training_reference
from burnish.kernels.cpu.training_weights import weight_kernels


class Int8Frozen(FrozenLinear):
    """y = x W' + b with W in 8 bits and one scale per output feature.

    Args:
        in_features, out_features, bias, device, dtype: as in `FrozenLinear`.

    Attributes:
        weight: (out, in), int8, -127..127.
        weight_scale: (out,), float32, never 0.
        bias: (out,) or None.
    """

    kept_dtypes = ("weight_scale",)
    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, name: str = "weight") -> Int8Frozen:
        """Quantize a dense linear, which stays as it is; raises as `quantize_`."""
        weight_OI = linear.weight
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device=weight_OI.device,
            dtype=weight_OI.dtype,
        )
        layer.quantize_(weight_OI, name=name)
        if layer.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
        return layer

    def quantize_(self, weight_OI: Tensor, *, name: str = "weight") -> None:
        """See `FrozenLinear.quantize_`."""
        quantize_rows(weight_OI.detach(), self.weight, self.weight_scale, name=name)

    def dequantized(self, dtype: torch.dtype, *, out_OI: Tensor | None = None) -> Tensor:
        """See `FrozenLinear.dequantized`."""
        if out_OI is None:
            out_OI = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        kernels = weight_kernels(self.weight.device, dtype) or training_reference
        return kernels.dequantize_rows(self.weight, self.weight_scale, out_OI)
