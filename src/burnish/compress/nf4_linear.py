"""A frozen linear in four bits: what 4-bit QLoRA trains on. The arithmetic of the format is in `nf4.py`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from burnish.compress.frozen_linear import FrozenLinear
from burnish.compress.nf4 import SCALES_PER_BLOCK, BlockFormat, BlockScales, dequantize_blocks, quantize_blocks


class Nf4Linear(FrozenLinear):
    """y = x W' + b with W in NF4 or FP4.

    Args:
        in_features, out_features, bias, device, dtype: as in `FrozenLinear`.
        block_format: levels, weights per scale, and whether scales are quantized too.

    Attributes:
        packed: (ceil(out * in / 2),), uint8, two weights a byte in the order of the matrix's rows.
        absmax: (blocks,), scale of each block: uint8 when double, else float32.
        absmax_scale: (ceil(blocks / 256),), float32, when double.
        absmax_offset: (), float32, when double.
        bias: (out,) or None.
    """

    kept_dtypes = ("absmax", "absmax_scale", "absmax_offset")
    packed: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        block_format: BlockFormat | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.block_format = block_format or BlockFormat()
        weights = in_features * out_features
        blocks, double = self.block_format.num_blocks(weights), self.block_format.double
        scales = -(-blocks // SCALES_PER_BLOCK)
        kind = torch.uint8 if double else torch.float32
        self.register_buffer("packed", torch.zeros(-(-weights // 2), dtype=torch.uint8, device=device))
        self.register_buffer("absmax", torch.zeros(blocks, dtype=kind, device=device))
        self.register_buffer("absmax_scale", torch.zeros(scales, device=device) if double else None)
        self.register_buffer("absmax_offset", torch.zeros((), device=device) if double else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, block_format: BlockFormat | None = None, name: str = "weight"
    ) -> Nf4Linear:
        """Quantize a dense linear, which stays as it is; raises as `quantize_`."""
        weight_OI = linear.weight
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            block_format=block_format,
            device=weight_OI.device,
            dtype=weight_OI.dtype,
        )
        layer.quantize_(weight_OI, name=name)
        if layer.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
        return layer

    def quantize_(self, weight_OI: Tensor, *, name: str = "weight") -> None:
        """See `FrozenLinear.quantize_`."""
        scales = quantize_blocks(weight_OI, self.block_format, self.packed, name=name)
        self.absmax.copy_(scales.absmax)
        for held, made in ((self.absmax_scale, scales.scale), (self.absmax_offset, scales.offset)):
            if held is not None and made is not None:
                held.copy_(made)

    def dequantized(self, dtype: torch.dtype, *, out_OI: Tensor | None = None) -> Tensor:
        """See `FrozenLinear.dequantized`."""
        scales = BlockScales(absmax=self.absmax, scale=self.absmax_scale, offset=self.absmax_offset)
        shape = (self.out_features, self.in_features)
        out_OI = torch.empty(shape, dtype=dtype, device=self.packed.device) if out_OI is None else out_OI
        return dequantize_blocks(self.packed, scales, self.block_format, out_OI)

    def extra_repr(self) -> str:
        kind = self.block_format
        return f"{super().extra_repr()}, kind={kind.kind}, block_size={kind.block_size}, double={kind.double}"
