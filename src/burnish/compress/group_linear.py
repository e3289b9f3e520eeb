"""A linear whose weight is stored as small integers with a scale per group, and runs from them.

A layer is in one of two states. *Packed* is the file's layout (qweight, qzeros, scales, g_idx), what loading fills and
state_dict gives. *Prepared* is what forward reads: one signed integer per weight, centred on its zero point, and the
scales; the packed tensors are dropped while it holds, so the weights are in memory once. The first forward prepares.
Forward rebuilds the weight a few rows at a time in the input's dtype, so that it never stands there whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.compress.packing import num_words, pack, unpack
from burnish.compress.quantized_weight import (
    SCALE_DTYPE,
    QuantizedWeight,
    group_width,
    num_groups,
    trivial_g_idx,
)
from burnish.errors import CheckpointError

# O out features, I in features (N: sorted by group), G groups, W columns of a full group, R rows of one slab

PACKED = ("qweight", "qzeros", "scales", "g_idx")
PREPARED = ("centred", "group_scales", "group_zeros", "column_order", "column_groups")
SLAB_WEIGHTS = 1 << 18
"""Weights rebuilt at once: 1 MiB in float32 stays in a core's cache between the rebuilding and the product."""


class GroupQuantizedLinear(nn.Module):
    """y = x W' + b with W kept in 2, 3, 4 or 8 bits.

    Args:
        in_features: width of x.
        out_features: width of y.
        bits: bits per weight.
        group_size: input features per scale; -1 is all of them.
        bias: whether there is one.
        zero_offset: what the stored zero points lack: 1 in the common layout ("gptq"), 0 in "gptq_v2".
        device, dtype: of the buffers and of the bias; scales are float16 whatever the dtype.

    Attributes:
        qweight: (ceil(in * bits / 32), out), int32, packed along the input features.
        qzeros: (groups, ceil(out * bits / 32)), int32, zero points less `zero_offset`, packed along output features.
        scales: (groups, out), float16.
        g_idx: (in,), int32; None before loading a file that has none: groups in plain order.
    """

    qweight: Tensor | None
    qzeros: Tensor | None
    scales: Tensor | None
    g_idx: Tensor | None
    centred: Tensor | None
    group_scales: Tensor | None
    group_zeros: Tensor | None
    column_order: Tensor | None
    column_groups: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        bias: bool = False,
        zero_offset: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.zero_offset = zero_offset
        self._is_regular: bool | None = None
        groups = num_groups(in_features, group_size)
        self.register_buffer(
            "qweight", torch.zeros(num_words(in_features, bits), out_features, dtype=torch.int32, device=device)
        )
        self.register_buffer(
            "qzeros", torch.zeros(groups, num_words(out_features, bits), dtype=torch.int32, device=device)
        )
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=SCALE_DTYPE, device=device))
        self.register_buffer("g_idx", trivial_g_idx(in_features, group_size).to(device or "cpu"))
        for name in PREPARED:
            self.register_buffer(name, None, persistent=False)
        bias_O = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )
        self.bias = bias_O

    @classmethod
    def from_quantized(
        cls, quantized: QuantizedWeight, *, bias: Tensor | None = None, zero_offset: int = 1
    ) -> GroupQuantizedLinear:
        """A packed layer that holds exactly `quantized`; the bias is copied and frozen."""
        out_features, in_features = quantized.ints.shape
        layer = cls(
            in_features,
            out_features,
            bits=quantized.bits,
            group_size=quantized.group_size,
            bias=bias is not None,
            zero_offset=zero_offset,
            device=quantized.ints.device,
            dtype=None if bias is None else bias.dtype,
        )
        layer._fill(quantized)
        if layer.bias is not None and bias is not None:
            layer.bias.data.copy_(bias)
        return layer

    @property
    def scales_dtype(self) -> torch.dtype:
        """float16, unless loaded from a file that says otherwise."""
        return self._held("scales" if self.centred is None else "group_scales").dtype

    def quantized(self) -> QuantizedWeight:
        """The integers, scales and zero points, whichever state the layer is in.

        Raises:
            CheckpointError: packed, and g_idx names a group that the scales do not have.
        """
        if self.centred is None:
            return self._unpacked()
        g_idx, zeros_OG = self._held("column_groups"), self._held("group_zeros")
        ints_ON = self.centred.int() + zeros_OG.int().index_select(1, g_idx)
        if self.column_order is not None:
            back_I = torch.argsort(self.column_order)
            ints_ON, g_idx = ints_ON[:, back_I], g_idx[back_I]
        return QuantizedWeight(
            ints=ints_ON.to(torch.uint8),
            scales=self._held("group_scales"),
            zeros=zeros_OG,
            g_idx=g_idx,
            bits=self.bits,
            group_size=self.group_size,
        )

    def groups_of_columns(self) -> Tensor:
        """The group of each input feature, (in,) int32, without unpacking the weight."""
        if self.centred is not None:
            groups_N = self._held("column_groups")
            return groups_N if self.column_order is None else groups_N[torch.argsort(self.column_order)]
        return self._packed_groups()

    def dequantize(self, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight the layer stands for: (out, in)."""
        return self.quantized().dequantize(dtype=dtype)

    def dequantized(self, dtype: torch.dtype, *, out_OI: Tensor | None = None) -> Tensor:
        """The weight that forward multiplies by, dense: (out, in), rebuilt in `dtype`; in `out_OI` if given."""
        self.prepare()
        if self.column_order is None:
            return self._slab(0, self.out_features, dtype, scratch_RN=out_OI)
        weight_ON = self._slab(0, self.out_features, dtype)
        return torch.index_select(weight_ON, 1, torch.argsort(self.column_order), out=out_OI)

    def prepare(self) -> GroupQuantizedLinear:
        """Change to the state that forward reads and drop the packed tensors; does nothing when done before.

        Raises:
            CheckpointError: g_idx names a group that the scales do not have.
        """
        if self.centred is not None:
            return self
        whole = self._unpacked()
        groups_I = whole.g_idx
        order_I = torch.argsort(groups_I, stable=True)
        in_order = bool((order_I == torch.arange(self.in_features, device=order_I.device)).all())
        # 8-bit weights with a free zero point span -255..255; everything else fits a byte.
        small = self.bits < 8 or bool((whole.zeros == 128).all())
        centred_OI = whole.ints.to(torch.int16) - whole.zeros.to(torch.int16).index_select(1, groups_I.long())
        centred_OI = centred_OI.to(torch.int8) if small else centred_OI
        self.centred = centred_OI if in_order else centred_OI[:, order_I]
        self.group_scales = whole.scales
        self.group_zeros = whole.zeros
        self.column_order = None if in_order else order_I
        self.column_groups = groups_I if in_order else groups_I[order_I]
        for name in PACKED:
            setattr(self, name, None)
        return self

    def release(self) -> GroupQuantizedLinear:
        """Back to the packed state, exactly as it was; does nothing when packed."""
        if self.centred is not None:
            quantized = self.quantized()
            for name in PREPARED:
                setattr(self, name, None)
            self._fill(quantized)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) in any float dtype to (..., out) in the same dtype; gradients reach x only."""
        self.prepare()
        if self.column_order is not None:
            x = x.index_select(-1, self.column_order)
        if torch.is_grad_enabled() and x.requires_grad:
            y: Tensor = _FrozenProduct.apply(x, self)  # pyright: ignore[reportAssignmentType]
        else:
            y = self._product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )

    def _product(self, x: Tensor) -> Tensor:
        """x W', slab by slab."""
        rows = max(1, SLAB_WEIGHTS // self.in_features)
        if rows >= self.out_features:
            return F.linear(x, self._slab(0, self.out_features, x.dtype))
        y = x.new_empty(*x.shape[:-1], self.out_features)
        scratch_RN = x.new_empty(rows, self.in_features)
        for first in range(0, self.out_features, rows):
            last = min(first + rows, self.out_features)
            y[..., first:last] = F.linear(x, self._slab(first, last, x.dtype, scratch_RN=scratch_RN))
        return y

    def _slab(self, first: int, last: int, dtype: torch.dtype, *, scratch_RN: Tensor | None = None) -> Tensor:
        """Rows first..last of the weight in `dtype`, columns sorted by group: (rows, in), in `scratch_RN` if given."""
        centred_RN = self._held("centred")[first:last]
        weight_RN = centred_RN.to(dtype) if scratch_RN is None else scratch_RN[: last - first].copy_(centred_RN)
        scales_RG = self._held("group_scales")[first:last].to(dtype)
        width = group_width(self.in_features, self.group_size)
        groups = scales_RG.shape[1]
        if groups == 1:
            return weight_RN.mul_(scales_RG)
        if not self._regular(width):
            return weight_RN.mul_(scales_RG.index_select(1, self._held("column_groups")))
        full = self.in_features // width
        weight_RN[:, : full * width].unflatten(1, (full, width)).mul_(scales_RG[:, :full, None])
        if full < groups:
            weight_RN[:, full * width :].mul_(scales_RG[:, full:])
        return weight_RN

    def _regular(self, width: int) -> bool:
        """Whether the sorted columns fill the groups one after another, only the last one short."""
        if self._is_regular is None:
            groups_N = self._held("column_groups")
            self._is_regular = bool((groups_N == trivial_g_idx(self.in_features, width).to(groups_N.device)).all())
        return self._is_regular

    def _packed_groups(self) -> Tensor:
        scales_GO = self._held("scales")
        groups = scales_GO.shape[0]
        plain_I = trivial_g_idx(self.in_features, self.group_size).to(scales_GO.device)
        g_idx = plain_I if self.g_idx is None else self.g_idx.to(torch.int32)
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise CheckpointError(
                "g_idx names a group that the scales do not have",
                got=f"groups {int(g_idx.min())}..{int(g_idx.max())}",
                expected=f"0..{groups - 1}",
            )
        if groups > 1 and int(g_idx.max()) == 0:
            # Files of the first programs to write this layout leave g_idx at zero where the order is plain.
            g_idx = plain_I
        return g_idx

    def _unpacked(self) -> QuantizedWeight:
        scales_GO = self._held("scales")
        g_idx = self._packed_groups()
        zeros_OG = unpack(self._held("qzeros").t().contiguous(), self.bits, self.out_features)
        # The offset wraps at the grid's size, as in the program that defined the layout.
        zeros_OG = (zeros_OG + self.zero_offset) & ((1 << self.bits) - 1)
        return QuantizedWeight(
            ints=unpack(self._held("qweight"), self.bits, self.in_features).t().contiguous(),
            scales=scales_GO.t().contiguous(),
            zeros=zeros_OG,
            g_idx=g_idx,
            bits=self.bits,
            group_size=self.group_size,
        )

    def _fill(self, quantized: QuantizedWeight) -> None:
        stored_OG = (quantized.zeros.to(torch.int16) - self.zero_offset) & ((1 << self.bits) - 1)
        self.qweight = pack(quantized.ints.t(), self.bits)
        self.qzeros = pack(stored_OG, self.bits).t().contiguous()
        self.scales = quantized.scales.t().contiguous()
        self.g_idx = quantized.g_idx.to(torch.int32)
        self._is_regular = None

    def _held(self, name: str) -> Tensor:
        tensor = getattr(self, name)
        assert tensor is not None, f"{name} belongs to the other state"
        return tensor

    def _apply(self, fn: Any, recurse: bool = True) -> GroupQuantizedLinear:
        """Move with the model, but keep the scales' dtype: a cast of the model must not change its weights."""
        kept = {name: scales for name in ("scales", "group_scales") if (scales := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.centred is not None:
            packed: Any = GroupQuantizedLinear.from_quantized(self.quantized(), zero_offset=self.zero_offset)
            for name in PACKED:
                destination[prefix + name] = getattr(packed, name)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args)


class _FrozenProduct(torch.autograd.Function):
    """x W' whose backward rebuilds W instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: GroupQuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer._product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer: GroupQuantizedLinear = ctx.layer
        gradient = gradients[0]
        rows = max(1, SLAB_WEIGHTS // layer.in_features)
        total = gradient.new_zeros(*gradient.shape[:-1], layer.in_features)
        for first in range(0, layer.out_features, rows):
            last = min(first + rows, layer.out_features)
            total += gradient[..., first:last] @ layer._slab(first, last, gradient.dtype)
        return total, None
