from __future__ import annotations

import pytest
import torch

from burnish.compress.rtn import quantize_weight
from burnish.errors import CompressionError


def _weight(rows: int = 12, columns: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 17, 50, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_error_stays_within_the_step(bits: int, group_size: int, symmetric: bool) -> None:
    weight = _weight()
    quantized = quantize_weight(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    step = quantized.scales.float()[:, quantized.g_idx.long()]
    # Half a step, and what rounding the scale to float16 shifts the outermost points by (127 * 2**-11 steps).
    assert ((quantized.dequantize() - weight).abs() <= 0.57 * step + 1e-6).all()
    assert int(quantized.ints.max()) <= (1 << bits) - 1


def test_last_group_is_short_when_the_size_does_not_divide() -> None:
    quantized = quantize_weight(_weight(columns=50), bits=4, group_size=16)
    assert quantized.scales.shape == (12, 4)
    assert quantized.g_idx.tolist() == [0] * 16 + [1] * 16 + [2] * 16 + [3] * 2


def test_symmetric_zero_point_is_the_middle() -> None:
    assert set(quantize_weight(_weight(), bits=4).zeros.flatten().tolist()) == {8}
    assert set(quantize_weight(_weight(), bits=8).zeros.flatten().tolist()) == {128}


def test_zero_point_is_never_zero_for_positive_weights() -> None:
    weight = _weight().abs() + 0.5
    quantized = quantize_weight(weight, bits=4, symmetric=False)
    assert int(quantized.zeros.min()) >= 1
    assert (quantized.dequantize() - weight).abs().max() < 0.2


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_weights_stay_exactly_zero(symmetric: bool) -> None:
    weight = _weight()
    weight[3] = 0.0
    weight[:, 16:32] = 0.0
    restored = quantize_weight(weight, bits=4, group_size=16, symmetric=symmetric).dequantize()
    assert restored[3].abs().max() == 0
    assert restored[:, 16:32].abs().max() == 0


@pytest.mark.parametrize("value", [3.0, -3.0])
def test_constant_weights_are_kept_by_a_fitted_grid(value: float) -> None:
    restored = quantize_weight(torch.full((4, 20), value), bits=4, symmetric=False).dequantize()
    assert torch.allclose(restored, torch.full((4, 20), value), rtol=1e-3)


def test_tiny_weights_get_a_storable_scale() -> None:
    quantized = quantize_weight(_weight() * 1e-9, bits=8)
    assert (quantized.scales > 0).all()
    assert torch.isfinite(quantized.dequantize()).all()


def test_scale_search_lowers_the_error_and_never_raises_it() -> None:
    weight = _weight(rows=64, columns=300)
    plain = quantize_weight(weight, bits=4).dequantize()
    searched = quantize_weight(weight, bits=4, scale_search=True).dequantize()
    before, after = ((each - weight).square().sum(dim=1) for each in (plain, searched))
    assert (after <= before + 1e-6).all()
    assert after.sum() < 0.9 * before.sum()


def test_bfloat16_weights_are_read_without_change() -> None:
    weight = _weight().bfloat16()
    kept = weight.clone()
    assert torch.equal(quantize_weight(weight, bits=4).ints, quantize_weight(weight.float(), bits=4).ints)
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_are_refused_by_name(bad: float) -> None:
    weight = _weight()
    weight[2, 5] = bad
    with pytest.raises(CompressionError, match=r"model\.layers\.1\.mlp\.up_proj holds 1 NaN or infinite"):
        quantize_weight(weight, bits=4, name="model.layers.1.mlp.up_proj")


def test_weights_beyond_float16_scales_are_refused() -> None:
    with pytest.raises(CompressionError, match="too large"):
        quantize_weight(_weight() * 1e7, bits=4, name="lm")
