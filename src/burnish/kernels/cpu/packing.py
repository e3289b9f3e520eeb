"""Laying weights out for the CPU kernels: panels of 16 output features, input features padded with zeros.

Shapes: N output features, K input features, G groups of input features that share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.errors import ConfigError
from burnish.kernels.cpu.arena import Arena
from burnish.kernels.cpu.library import CpuLibrary
from burnish.kernels.cpu.structs import Format, Linear

LANES = 16
K_ALIGN = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedLinear:
    """A linear as the kernels read it; `tensors` own the memory that `struct` points into."""

    struct: Linear
    tensors: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


def pack_float(
    library: CpuLibrary, weight_NK: Tensor, *, bias_N: Tensor | None = None, arena: Arena | None = None
) -> PackedLinear:
    """A float32 or bfloat16 weight in its own dtype; other dtypes become float32."""
    if weight_NK.dtype not in (torch.float32, torch.bfloat16):
        weight_NK = weight_NK.float()
    num_outputs, num_inputs = weight_NK.shape
    short = weight_NK.dtype == torch.bfloat16
    struct = _linear(Format.BF16 if short else Format.F32, num_outputs, num_inputs)
    packed = (arena or Arena()).zeros(struct.num_panels * LANES * struct.k_padded, weight_NK.dtype)
    rows = weight_NK.detach().contiguous()
    pack = library.functions.burnish_pack_bf16 if short else library.functions.burnish_pack_f32
    pack(rows.data_ptr(), num_outputs, num_inputs, rows.stride(0), struct.k_padded, packed.data_ptr())
    return _finished(struct, weight=packed, bias=_padded(bias_N, struct))


def pack_int8(
    library: CpuLibrary,
    weight_NK: Tensor,
    scale_N: Tensor,
    *,
    bias_N: Tensor | None = None,
    arena: Arena | None = None,
) -> PackedLinear:
    """Signed bytes with one scale per output feature."""
    num_outputs, num_inputs = weight_NK.shape
    struct = _linear(Format.INT8, num_outputs, num_inputs)
    packed = (arena or Arena()).zeros(struct.num_panels * LANES * struct.k_padded, torch.uint8)
    rows = weight_NK.detach().contiguous()
    library.functions.burnish_pack_bytes(
        rows.data_ptr(), num_outputs, num_inputs, rows.stride(0), struct.k_padded, 128, packed.data_ptr()
    )
    return _finished(struct, weight=packed, scale=_padded(scale_N, struct), bias=_padded(bias_N, struct))


def pack_grouped(
    library: CpuLibrary,
    ints_NK: Tensor,
    scales_NG: Tensor,
    zeros_NG: Tensor,
    *,
    bits: int,
    group_size: int,
    order_K: Tensor | None = None,
    bias_N: Tensor | None = None,
    arena: Arena | None = None,
) -> PackedLinear:
    """Unsigned integers of up to 4, or of 8 bits, with a scale and a zero point per group of input features.

    Args:
        ints_NK: uint8, columns sorted by group.
        group_size: input features per group, a multiple of 8; -1 is all of them.
        order_K: column j of `ints_NK` belongs to input feature order_K[j]; None where they agree.

    Raises:
        ConfigError: the group size is not a multiple of 8.
    """
    num_outputs, num_inputs = ints_NK.shape
    if scales_NG.shape[1] > 1 and group_size % 8:
        raise ConfigError("the CPU kernels need groups of whole eights", got=f"group_size {group_size}")
    nibbles = bits <= 4
    struct = _linear(Format.INT4 if nibbles else Format.INT8_GROUPED, num_outputs, num_inputs)
    struct.num_groups = scales_NG.shape[1]
    struct.group = struct.k_padded if struct.num_groups == 1 else group_size
    size = struct.num_panels * LANES * struct.k_padded
    packed = (arena or Arena()).zeros(size // 2 if nibbles else size, torch.uint8)
    rows = ints_NK.to(torch.uint8).contiguous()
    functions = library.functions
    if nibbles:
        functions.burnish_pack_nibbles(
            rows.data_ptr(), num_outputs, num_inputs, rows.stride(0), struct.k_padded, packed.data_ptr()
        )
    else:
        functions.burnish_pack_bytes(
            rows.data_ptr(), num_outputs, num_inputs, rows.stride(0), struct.k_padded, 0, packed.data_ptr()
        )
    return _finished(
        struct,
        weight=packed,
        group_scale=_by_panel(scales_NG.to(torch.float16), struct),
        group_zero=_by_panel(zeros_NG.to(torch.uint8), struct),
        requant_scale=_padded(_largest_N(rows, scales_NG, zeros_NG, struct) / 127.0, struct),
        bias=_padded(bias_N, struct),
        order=None if order_K is None else order_K.to(torch.int32).contiguous(),
    )


def interleaved(gate_NK: Tensor, up_NK: Tensor) -> Tensor:
    """Sixteen rows of `gate_NK`, sixteen of `up_NK`, and so on, each padded with zeros to whole sixteens."""
    missing = -gate_NK.shape[0] % LANES
    padding = (0, 0) * (gate_NK.dim() - 1) + (0, missing)
    parts = [F.pad(part, padding).unflatten(0, (-1, LANES)) for part in (gate_NK, up_NK)]
    return torch.stack(parts, dim=1).flatten(0, 2)


def joined_bias(biases: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Biases one after the other, zeros for those that are None; None where all are."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat([torch.zeros(size) if bias is None else bias.float() for bias, size in zip(biases, sizes)])


def _linear(format_: Format, num_outputs: int, num_inputs: int) -> Linear:
    k_padded = -(-num_inputs // K_ALIGN) * K_ALIGN
    num_panels = -(-num_outputs // (2 * LANES)) * 2
    return Linear(
        format=format_,
        n=num_outputs,
        k=num_inputs,
        num_panels=num_panels,
        k_padded=k_padded,
        group=k_padded,
        num_groups=1,
    )


def _padded(values_N: Tensor | None, struct: Linear) -> Tensor | None:
    """float32, with zeros up to whole panels."""
    if values_N is None:
        return None
    return F.pad(values_N.detach().float(), (0, struct.num_panels * LANES - values_N.shape[0])).contiguous()


def _by_panel(values_NG: Tensor, struct: Linear) -> Tensor:
    """(N, G) to (panels, G, 16)."""
    padded = F.pad(values_NG, (0, 0, 0, struct.num_panels * LANES - values_NG.shape[0]))
    return padded.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def _largest_N(ints_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor, struct: Linear) -> Tensor:
    """The largest magnitude that each output feature's integers stand for."""
    largest_N = torch.zeros(ints_NK.shape[0])
    for group in range(struct.num_groups):
        low_N, high_N = torch.aminmax(ints_NK[:, group * struct.group : (group + 1) * struct.group], dim=1)
        zero_N = zeros_NG[:, group].to(torch.int16)
        distance_N = torch.maximum(high_N.to(torch.int16) - zero_N, zero_N - low_N.to(torch.int16))
        largest_N = torch.maximum(largest_N, distance_N.float() * scales_NG[:, group].float().abs())
    return largest_N


def _finished(struct: Linear, **tensors: Tensor | None) -> PackedLinear:
    held = []
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(struct, name, c_void_p(tensor.data_ptr()))
            held.append(tensor)
    return PackedLinear(struct=struct, tensors=tuple(held))
