from __future__ import annotations

import math

import pytest
import torch

from burnish.compress import rtn
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.group_rounding import round_groups
from burnish.errors import CompressionError


def _rounded(weight: torch.Tensor, group_size: int) -> GroupQuantizedLinear:
    layer = GroupQuantizedLinear(weight.shape[1], weight.shape[0], bits=4, group_size=group_size)
    layer.g_idx = None
    round_groups(weight, layer, name="up_proj")
    return layer


def _error(layer: torch.Tensor, weight: torch.Tensor) -> float:
    return float((layer - weight).norm() / weight.norm())


@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (37, 172), (5, 1000), (64, 7)])
@pytest.mark.parametrize("group_size", [16, 64, 128])
def test_packed_words_hold_the_integers_of_any_shape(shape: tuple[int, int], group_size: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = _rounded(weight, group_size)
    again = GroupQuantizedLinear.from_quantized(layer.quantized())
    assert torch.equal(again.qweight, layer.qweight)  # type: ignore[arg-type]
    assert torch.equal(again.qzeros, layer.qzeros)  # type: ignore[arg-type]
    assert _error(layer.dequantize(), weight) < 0.15


@pytest.mark.parametrize("group_size", [64, 128])
def test_error_is_that_of_the_slow_search(group_size: int) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    slow = rtn.quantize_weight(weight, bits=4, group_size=group_size, symmetric=False, scale_search=True)
    plain = rtn.quantize_weight(weight, bits=4, group_size=group_size, symmetric=False)
    error = _error(_rounded(weight, group_size).dequantize(), weight)
    assert error < 1.02 * _error(slow.dequantize(), weight)
    assert error < _error(plain.dequantize(), weight)


def test_rows_of_one_sign_of_zeros_and_of_one_outlier_are_held() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[0] = 0.0
    weight[1] = weight[1].abs() + 1.0
    weight[2] = -weight[2].abs() - 1.0
    weight[3] = 0.0
    weight[3, 9] = 3.0
    layer = _rounded(weight, 64)
    assert layer.dequantize()[0].eq(0).all()
    assert layer.quantized().zeros.min() >= 1
    torch.testing.assert_close(layer.dequantize()[1:3], weight[1:3], atol=0.2, rtol=0.05)
    torch.testing.assert_close(layer.dequantize()[3], weight[3], atol=0.01, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_weights_that_no_scale_holds_are_refused_by_name(bad: float) -> None:
    weight = torch.randn(4, 64)
    weight[2, 3] = bad
    with pytest.raises(CompressionError, match="up_proj"):
        _rounded(weight, 64)


def test_bfloat16_weights_are_rounded_as_their_float32_values() -> None:
    weight = torch.randn(8, 64).bfloat16()
    assert torch.equal(_rounded(weight, 64).dequantize(), _rounded(weight.float(), 64).dequantize())
