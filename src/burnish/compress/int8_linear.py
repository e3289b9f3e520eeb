"""A linear that multiplies 8-bit integers: weights per output feature, activations per token, both symmetric.

The forward here is plain torch and defines the arithmetic; compiled kernels and other backends have to agree with it:

    scale_T   = max |x_TI| over I / 127                       float32
    ints_TI   = round half to even (x_TI / scale_T), clamped to -127..127
    y_TO      = (sum over I of ints_TI * weight_OI, exact) * weight_scale_O * scale_T + bias_O

Dettmers et al., 2022, arXiv:2208.07339 call it vector-wise quantization (without its outliers in 16 bits).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from burnish.compress.quantized_weight import check_weight
from burnish.kernels.reference import LARGEST, integer_product, quantize_activations

# T tokens (all leading dimensions of x), I in features, O out features

ROUNDING = 1.5 * (1 << 23)
"""Adding and subtracting it rounds a float32 of less than 2^22 half to even, on the thread that asks (see below)."""
SLAB_WEIGHTS = (1 << 15) - 1
"""Weights quantized at once: they stay in the core's cache, and torch runs so few without waking other threads."""


class Int8Linear(nn.Module):
    """y = x W' + b from an 8-bit weight and activations that are rounded to 8 bits token by token. Inference only.

    Args:
        in_features: width of x.
        out_features: width of y.
        bias: whether there is one.
        device, dtype: of the buffers and of the bias; the scales are float32 whatever the dtype.

    Attributes:
        weight: (out, in), int8, -127..127.
        weight_scale: (out,), float32, never 0.
        bias: (out,) or None.
    """

    weight: Tensor
    weight_scale: Tensor
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
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, name: str = "weight") -> Int8Linear:
        """Quantize a dense linear, which stays as it is; raises as `quantize_rows`."""
        weight_OI = linear.weight
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device=weight_OI.device,
            dtype=weight_OI.dtype,
        )
        quantize_rows(weight_OI.detach(), layer.weight, layer.weight_scale, name=name)
        if layer.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
        return layer

    def dequantize(self, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight the layer stands for: (out, in)."""
        return (self.weight.float() * self.weight_scale[:, None]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) in any float dtype to (..., out) in the same dtype; rows with NaN or infinities become NaN."""
        ints_TI, scale_T = quantize_activations(x.reshape(-1, self.in_features))
        y_TO = integer_product(ints_TI, self.weight).mul_(self.weight_scale).mul_(scale_T[:, None])
        if self.bias is not None:
            y_TO += self.bias
        return y_TO.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn, recurse: bool = True) -> Int8Linear:
        """Move with the model, but keep the scales' dtype: a cast of the model must not change its weights."""
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self


def quantize_rows(weight_OI: Tensor, ints_OI: Tensor, scale_O: Tensor, *, name: str = "weight") -> None:
    """Round each row to 8 bits by its largest magnitude, into `ints_OI` (int8) and `scale_O` (float32).

    Args:
        weight_OI: (out, in), any float dtype; not modified, and gone through in slabs of a few rows.
        name: the layer, for messages.

    Raises:
        CompressionError: NaN or infinite weights, or no matrix.
    """
    rows = slab_rows(weight_OI)
    for start in range(0, weight_OI.shape[0], rows):
        slab = slice(start, start + rows)
        slab_OI = weight_OI[slab].float()
        peak_O = slab_OI.abs().amax(dim=1) if slab_OI.numel() else slab_OI.new_zeros(slab_OI.shape[0])
        if not bool(torch.isfinite(peak_O).all()):
            check_weight(weight_OI, name)
        step_O = peak_O / LARGEST
        # A row of zeros has any scale; so has one so small that its step vanishes.
        step_O = torch.where(step_O > 0, step_O, 1.0)
        ints_OI[slab] = rounded(slab_OI / step_O[:, None]).clamp_(-LARGEST, LARGEST).to(torch.int8)
        scale_O[slab] = step_O


def rounded(values: Tensor) -> Tensor:
    """Round in place, half to even; float32 of magnitudes below 2^22. torch's own `round_` wakes all threads."""
    return values.add_(ROUNDING).sub_(ROUNDING)


def slab_rows(weight_OI: Tensor) -> int:
    """Rows of a weight to quantize at once."""
    return max(1, SLAB_WEIGHTS // max(1, weight_OI.shape[-1]))
