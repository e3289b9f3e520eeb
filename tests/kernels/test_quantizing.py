"""Quantizing's compiled kernels beside their torch twins, on every instruction set that runs here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.compress.gptq import inverse_factor, quantize_columns
from burnish.compress.quantized_weight import SHRINKS
from burnish.errors import CompressionError
from burnish.kernels import quantizing_reference as twin
from burnish.kernels.cpu.library import CpuLibrary
from burnish.kernels.cpu.quantizing import QuantizingKernels


@pytest.fixture
def kernels(library: CpuLibrary) -> QuantizingKernels:
    return QuantizingKernels(library, threads=2)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 5), (33, 32), (513, 70), (1100, 200), (64, 700)])
def test_moments_equal_the_twins(kernels: QuantizingKernels, rows: int, width: int) -> None:
    if not kernels.has_moments:
        pytest.skip("torch does them here")
    # Rows that lie apart, and begin nowhere in particular.
    x_NI = torch.randn(rows, width + 3, generator=torch.Generator().manual_seed(0)).bfloat16()[:, 1 : width + 1]
    ours_II, theirs_II = torch.zeros(width, width), torch.zeros(width, width)
    for _ in range(2):
        kernels.add_moments(x_NI, ours_II)
        twin.add_moments(x_NI, theirs_II)
    ours_II, theirs_II = twin.mirrored(ours_II), twin.mirrored(theirs_II)
    exact_II = 2 * (x_NI.double().t() @ x_NI.double())
    assert torch.equal(ours_II, ours_II.t())
    for found_II in (ours_II, theirs_II):
        assert torch.allclose(found_II.double(), exact_II, rtol=1e-5, atol=1e-5 * rows**0.5)


def _problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(rows, columns, generator=generator)
    x_NI = torch.randn(3 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return weight_OI, inverse_factor(x_NI.t() @ x_NI, damping=0.01)


def _loss(weight_OI: Tensor, found: tuple[Tensor, Tensor, Tensor], factor_II: Tensor, width: int) -> float:
    ints_OI, scales_OG, zeros_OG = found
    group_I = torch.arange(weight_OI.shape[1]) // width
    difference_OI = (ints_OI.float() - zeros_OG.float()[:, group_I]) * scales_OG[:, group_I] - weight_OI
    return float(torch.linalg.solve_triangular(factor_II, difference_OI, upper=True, left=False).square().sum())


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("rows", "columns", "width"), [(37, 70, 16), (16, 33, 33), (64, 100, 24), (5, 7, 3), (1, 1, 1)]
)
def test_columns_equal_the_twins(
    kernels: QuantizingKernels, rows: int, columns: int, width: int, bits: int, symmetric: bool, search: bool
) -> None:
    weight_OI, factor_II = _problem(rows, columns)
    before_OI = weight_OI.clone()
    importance_I = factor_II.diagonal().square().reciprocal() if search else None
    ours = kernels.gptq(
        weight_OI, factor_II, bits=bits, width=width, symmetric=symmetric,
        shrinks=SHRINKS if search else (), importance_I=importance_I,
    )  # fmt: skip
    theirs = quantize_columns(
        weight_OI, factor_II, bits=bits, width=width, symmetric=symmetric, importance_I=importance_I
    )
    assert torch.equal(weight_OI, before_OI)
    # A place halfway between two integers may fall either way, and what follows then differs.
    same = (ours[0] == theirs[0]).float().mean()
    assert float(same) > 0.97
    assert int(ours[0].max()) < 1 << bits
    assert torch.equal(ours[1], ours[1].half().float())
    ours_loss, theirs_loss = (_loss(weight_OI, found, factor_II, width) for found in (ours, theirs))
    assert ours_loss == pytest.approx(theirs_loss, rel=0.02, abs=1e-9)


def test_columns_do_not_depend_on_threads(library: CpuLibrary) -> None:
    weight_OI, factor_II = _problem(200, 48)
    one, three = (
        QuantizingKernels(library, threads=threads).gptq(weight_OI, factor_II, bits=4, width=16, symmetric=True)
        for threads in (1, 3)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, three))


def test_columns_of_a_wide_weight_share_panels(kernels: QuantizingKernels) -> None:
    weight_OI = torch.randn(70, 2080, generator=torch.Generator().manual_seed(2))
    factor_II = torch.eye(2080) * 0.5
    ints_OI, scales_OG, zeros_OG = kernels.gptq(weight_OI, factor_II, bits=4, width=64, symmetric=True)
    theirs = quantize_columns(weight_OI, factor_II, bits=4, width=64, symmetric=True)
    assert torch.equal(scales_OG, theirs[1])
    assert torch.equal(zeros_OG, theirs[2])
    assert float((ints_OI == theirs[0]).float().mean()) > 0.9999


def test_columns_of_zeros_stay_zeros(kernels: QuantizingKernels) -> None:
    ints_OI, scales_OG, zeros_OG = kernels.gptq(torch.zeros(3, 20), torch.eye(20), bits=4, width=8, symmetric=False)
    assert torch.equal(ints_OI, torch.ones_like(ints_OI))
    assert torch.equal(scales_OG, torch.ones_like(scales_OG))
    assert torch.equal(zeros_OG, torch.ones_like(zeros_OG))


def test_scales_beyond_float16_are_an_error(kernels: QuantizingKernels) -> None:
    with pytest.raises(CompressionError, match="too large for float16"):
        kernels.gptq(torch.full((2, 8), 1e7), torch.eye(8), bits=4, width=8, symmetric=True)
