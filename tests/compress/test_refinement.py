from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.compress import gptq, rtn
from burnish.compress.quantized_weight import QuantizedWeight
from burnish.compress.refinement import refine_weight

SIZE, ROWS, DAMPING = 45, 20, 0.01


def _problem() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(300, SIZE, generator=generator) @ torch.randn(SIZE, SIZE, generator=generator)
    return torch.randn(ROWS, SIZE, generator=generator), inputs.t() @ inputs / 300


def _loss(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    """Of each row, in float64, by the damped Hessian."""
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(SIZE, dtype=torch.float64)
    lost = quantized.dequantize().double() - weight.double()
    return ((lost @ damped) * lost).sum(dim=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activation_order", [True, False])
def test_no_row_gets_worse_and_gptq_gets_better(
    bits: int, group_size: int, symmetric: bool, activation_order: bool
) -> None:
    weight, hessian = _problem()
    start = gptq.quantize_weight(
        weight, hessian, bits=bits, group_size=group_size, symmetric=symmetric, activation_order=activation_order
    )
    before = _loss(weight, start, hessian)
    after = _loss(weight, refine_weight(weight, hessian, start, sweeps=3, damping=DAMPING), hessian)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.99 * before.sum()


def test_at_the_end_no_single_integer_can_be_changed_for_the_better() -> None:
    weight, hessian = _problem()
    start = rtn.quantize_weight(weight, bits=3, group_size=16)
    refined = refine_weight(weight, hessian, start, sweeps=200, damping=DAMPING)
    least = _loss(weight, refined, hessian)
    for column in range(SIZE):
        for step in (-1, 1):
            ints = refined.ints.int()
            ints[:, column] = (ints[:, column] + step).clamp(0, 7)
            other = QuantizedWeight(
                ints=ints.to(torch.uint8),
                scales=refined.scales,
                zeros=refined.zeros,
                g_idx=refined.g_idx,
                bits=3,
                group_size=16,
            )
            assert (_loss(weight, other, hessian) >= least * (1 - 1e-5)).all()


def test_grid_stays_what_files_hold() -> None:
    weight, hessian = _problem()
    start = gptq.quantize_weight(weight, hessian, bits=2, group_size=16, symmetric=False)
    refined = refine_weight(weight, hessian, start, sweeps=4)
    assert refined.scales.dtype == torch.float16
    assert (refined.scales > 0).all()
    assert refined.ints.dtype == torch.uint8
    assert refined.ints.max() <= 3
    assert torch.equal(refined.zeros, start.zeros)
    assert torch.equal(refined.g_idx, start.g_idx)


def test_nothing_given_is_modified() -> None:
    weight, hessian = _problem()
    start = gptq.quantize_weight(weight, hessian, bits=2)
    kept = [each.clone() for each in (weight, hessian, start.ints, start.scales)]
    refine_weight(weight, hessian, start, sweeps=2)
    assert all(torch.equal(now, then) for now, then in zip((weight, hessian, start.ints, start.scales), kept))


@pytest.mark.parametrize("value", [0.0, -0.7])
def test_constant_weights_and_silent_inputs_are_handled(value: float) -> None:
    weight, hessian = _problem()
    weight[:, :30] = value
    hessian[:, 3] = hessian[3] = 0.0
    start = rtn.quantize_weight(weight, bits=4, group_size=15)
    refined = refine_weight(weight, hessian, start, sweeps=2)
    assert torch.isfinite(refined.dequantize()).all()
    assert (refined.dequantize()[:, 3] - value).abs().max() < 0.1
    silent = refine_weight(weight, torch.zeros_like(hessian), start, sweeps=2)
    assert (silent.dequantize() - weight).square().sum() <= (start.dequantize() - weight).square().sum()
