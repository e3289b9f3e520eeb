"""Frozen weights of 4 and 8 bits rebuilt by the compiled kernels: bit for bit those of the twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.compress.nf4 import LEVELS, dynamic_levels
from burnish.kernels import training_reference as twin
from burnish.kernels.cpu.library import CpuLibrary
from burnish.kernels.cpu.training_weights import WeightKernels, weight_kernels

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1), (1, 3), (2, 31), (3, 21), (5, 64), (9, 67), (130, 173), (7, 1000), (0, 5))


@pytest.fixture
def kernels(library: CpuLibrary) -> WeightKernels:
    return WeightKernels(library, threads=2)


def apart(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows that lie apart, and the buffer that they are part of."""
    buffer = torch.full((shape[0], shape[1] + 9), 7.0, dtype=dtype)
    return buffer[:, 5 : 5 + shape[1]], buffer


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Zeros of the same sign; any NaN is a NaN."""
    assert torch.equal(got.isnan(), want.isnan())
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    numbers = ~want.isnan()
    assert torch.equal(got[numbers].view(bits), want[numbers].view(bits))


def scales_of(blocks: int, *, double: bool, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Plain ones with what a scale should never be among them."""
    generator = torch.Generator().manual_seed(seed)
    if not double:
        absmax = torch.randn(blocks, generator=generator)
        for place, bad in enumerate((torch.nan, 0.0, 1e-39, torch.inf, 3e38)):
            absmax[place + 1 :: 11] = bad
        return absmax, {}
    codes = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8)
    scale = torch.rand(-(-blocks // twin.SCALES_PER_BLOCK), generator=generator)
    levels = dynamic_levels(torch.device("cpu"))
    return codes, {"absmax_levels": levels, "absmax_scale": scale, "absmax_offset": torch.tensor(0.37)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", list(LEVELS))
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_four_bits_equal_the_twin(
    kernels: WeightKernels, dtype: torch.dtype, double: bool, kind: str, shape: tuple[int, int]
) -> None:
    weights = shape[0] * shape[1]
    packed = torch.randint(
        0, 256, (-(-weights // 2),), generator=torch.Generator().manual_seed(weights), dtype=torch.uint8
    )
    for block_size in (2, 6, 32, 64, 4096):
        absmax, more = scales_of(-(-weights // block_size), double=double, seed=weights)
        settings: dict[str, Any] = {"levels": LEVELS[kind], "block_size": block_size, **more}
        out, buffer = apart(shape, dtype)
        assert kernels.dequantize_blocks(packed, absmax, out, **settings) is out
        want = twin.dequantize_blocks(packed, absmax, torch.empty(shape, dtype=dtype), **settings)
        assert_same_bits(out, want)
        assert (buffer[:, :5] == 7).all()
        assert (buffer[:, 5 + shape[1] :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_eight_bits_equal_the_twin(kernels: WeightKernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    codes = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    scale, _ = scales_of(shape[0], double=False, seed=2)
    out, buffer = apart(shape, dtype)
    assert kernels.dequantize_rows(codes, scale, out) is out
    assert_same_bits(out, twin.dequantize_rows(codes, scale, torch.empty(shape, dtype=dtype)))
    assert (buffer[:, :5] == 7).all()
    assert (buffer[:, 5 + shape[1] :] == 7).all()


def test_scales_are_rounded_after_the_product_and_after_the_sum(kernels: WeightKernels) -> None:
    """A fused product and sum would differ in the last place for some."""
    absmax, more = scales_of(5000, double=True, seed=3)
    packed = torch.full((5000,), 0x77, dtype=torch.uint8)
    levels = (1.0,) * 16
    got = kernels.dequantize_blocks(packed, absmax, torch.empty(5000, 2), levels=levels, block_size=2, **more)
    double = more["absmax_levels"][absmax.int()].double()
    scale = more["absmax_scale"].repeat_interleave(256)[:5000].double()
    rounded = ((double * scale).float() + more["absmax_offset"])[:, None].expand(-1, 2)
    assert torch.equal(got, rounded)
    fused = (double * scale + more["absmax_offset"].double()).float()[:, None].expand(-1, 2)
    assert not torch.equal(got, fused), "the test would prove nothing"


def test_twin_fills_rows_that_lie_apart() -> None:
    absmax, more = scales_of(4, double=True, seed=4)
    packed = torch.arange(100, dtype=torch.uint8)
    settings: dict[str, Any] = {"levels": LEVELS["nf4"], "block_size": 64, **more}
    out, _ = apart((8, 25), torch.float32)
    twin.dequantize_blocks(packed, absmax, out, **settings)
    assert torch.equal(out, twin.dequantize_blocks(packed, absmax, torch.empty(8, 25), **settings))


def test_other_dtypes_and_devices_and_a_library_turned_off_have_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weight_kernels(torch.device("cpu"), torch.float16) is None
    assert weight_kernels(torch.device("meta"), torch.float32) is None
    monkeypatch.setenv("BURNISH_CPU_KERNELS", "off")
    assert weight_kernels(torch.device("cpu"), torch.float32) is None
