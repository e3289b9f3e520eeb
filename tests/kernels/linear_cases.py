"""Random linears of every format beside their torch twins.

Shapes: M rows, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.kernels import reference
from burnish.kernels.cpu.library import CpuLibrary
from burnish.kernels.cpu.packing import PackedLinear, pack_float, pack_grouped, pack_int8

FORMATS = ("float32", "bfloat16", "int8", "int4_grouped", "int8_grouped")
GROUPED = ("int4_grouped", "int8_grouped")
FEWEST_TILED_ROWS = 5
"""From this many rows on, the AMX kernels multiply with tiles."""
FEWEST_WIDENED_ROWS = 20
"""From this many rows on, the AMX kernels multiply grouped weights as int8 with one scale per output feature."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A packed linear, its twin, and what its errors are measured against.

    Attributes:
        twin: (M, K) activations to (M, N).
        weight_NK: the weight that it stands for, float32, by plain input features.
    """

    packed: PackedLinear
    twin: Callable[[Tensor], Tensor]
    weight_NK: Tensor
    bias_N: Tensor | None = None

    def magnitude(self, x_MK: Tensor) -> Tensor:
        """(M, N): the sum of the products' magnitudes, which rounding errors are in proportion to."""
        size_MN = x_MK.double().abs() @ self.weight_NK.double().abs().t()
        return size_MN if self.bias_N is None else size_MN + self.bias_N.double().abs()


def make_case(
    library: CpuLibrary,
    format_: str,
    num_inputs: int,
    num_outputs: int,
    *,
    rows: int = 1,
    group_size: int = 32,
    bias: bool = False,
    ordered: bool = True,
    exact: bool = False,
    seed: int = 0,
) -> Case:
    """A random linear.

    Args:
        rows: how many rows it will be asked for; decides which arithmetic AMX takes for grouped weights.
        ordered: False gives grouped weights whose columns stand in an order of their own.
        exact: scales are powers of two, so that float32 sums of scaled integers are exact.
    """
    generator = torch.Generator().manual_seed(seed)
    bias_N = torch.randn(num_outputs, generator=generator) if bias else None
    if format_ in ("float32", "bfloat16"):
        weight_NK = torch.randn(num_outputs, num_inputs, generator=generator).to(getattr(torch, format_))
        packed = pack_float(library, weight_NK, bias_N=bias_N)
        return Case(
            packed=packed,
            twin=lambda x: reference.linear_float(x, weight_NK, bias_N=bias_N),
            weight_NK=weight_NK.float(),
            bias_N=bias_N,
        )
    if format_ == "int8":
        ints_NK = torch.randint(-127, 128, (num_outputs, num_inputs), generator=generator).to(torch.int8)
        scale_N = 2.0**-7 * torch.ones(num_outputs) if exact else torch.rand(num_outputs, generator=generator) / 64
        return Case(
            packed=pack_int8(library, ints_NK, scale_N, bias_N=bias_N),
            twin=lambda x: reference.linear_int8(x, ints_NK, scale_N, bias_N=bias_N),
            weight_NK=ints_NK.float() * scale_N[:, None],
            bias_N=bias_N,
        )
    bits = 4 if format_ == "int4_grouped" else 8
    groups = 1 if group_size == -1 else -(-num_inputs // group_size)
    ints_NK = torch.randint(0, 1 << bits, (num_outputs, num_inputs), generator=generator).to(torch.uint8)
    zeros_NG = torch.randint(0, 1 << bits, (num_outputs, groups), generator=generator).to(torch.uint8)
    scales_NG = (torch.rand(num_outputs, groups, generator=generator) / 64 + 1e-3).to(torch.float16)
    if exact:
        scales_NG = torch.full_like(scales_NG, 2.0**-6)
    order_K = None if ordered else torch.randperm(num_inputs, generator=generator)
    packed = pack_grouped(
        library, ints_NK, scales_NG, zeros_NG, bits=bits, group_size=group_size, order_K=order_K, bias_N=bias_N
    )
    weight_NK = reference.linear_grouped(
        torch.eye(num_inputs) * 127, ints_NK, scales_NG, zeros_NG, group_size=group_size, order_K=order_K
    ).t()

    def as_groups(x_MK: Tensor) -> Tensor:
        return reference.linear_grouped(
            x_MK, ints_NK, scales_NG, zeros_NG, group_size=group_size, order_K=order_K, bias_N=bias_N
        )

    def as_bytes(x_MK: Tensor) -> Tensor:
        whole_NK, scale_N = reference.requantized(ints_NK, scales_NG, zeros_NG, group_size=group_size)
        x_MK = x_MK if order_K is None else x_MK[:, order_K]
        return reference.linear_int8(x_MK, whole_NK, scale_N, bias_N=bias_N)

    widened = library.isa == "amx" and rows >= FEWEST_WIDENED_ROWS
    return Case(packed=packed, twin=as_bytes if widened else as_groups, weight_NK=weight_NK / 127, bias_N=bias_N)


def integers(rows: int, num_inputs: int, *, seed: int = 0) -> Tensor:
    """(M, K) activations that 8 bits hold without loss: quarters of -127..127, each row's first the largest."""
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randint(-127, 128, (rows, num_inputs), generator=generator).float()
    x_MK[:, 0] = 127.0
    return x_MK / 4


def assert_near(got_MN: Tensor, want_MN: Tensor, size_MN: Tensor, *, tolerance: float = 2e-6) -> None:
    """Differences are below `tolerance` of the sizes that were added up."""
    assert got_MN.shape == want_MN.shape
    worst = float(((got_MN.double() - want_MN.double()).abs() / size_MN.clamp_min(1e-30)).max())
    assert worst <= tolerance, f"off by {worst:.1e} of the sum of magnitudes"
