from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from burnish.compress.int8_linear import Int8Linear, quantize_rows
from burnish.errors import CompressionError

SIZES = [(1, 1, 1), (1, 7, 5), (7, 64, 64), (17, 172, 37), (3, 1000, 172), (33, 64, 1000)]


def _linear(inside: int, outside: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(inside, outside, bias=bias)


@pytest.mark.parametrize(("tokens", "inside", "outside"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_exact_integer_arithmetic(tokens: int, inside: int, outside: int, bias: bool) -> None:
    linear = _linear(inside, outside, bias=bias)
    layer = Int8Linear.from_linear(linear)
    x = torch.randn(tokens, inside)
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    ints = (x / scale).round().clamp(-127, 127)
    expected = (ints.double() @ layer.weight.double().t()) * scale.double() * layer.weight_scale.double()
    expected = expected + (linear.bias.double() if bias else 0.0)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_forward_is_close_to_the_dense_linear() -> None:
    linear = _linear(256, 128)
    x = torch.randn(4, 9, 256)
    before = linear.weight.detach().clone()
    error = (Int8Linear.from_linear(linear)(x) - linear(x)).norm() / linear(x).norm()
    assert torch.equal(linear.weight, before)
    assert error < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_and_shape_of_the_input(dtype: torch.dtype) -> None:
    layer = Int8Linear.from_linear(_linear(24, 10).to(dtype))
    assert layer.weight_scale.dtype == torch.float32
    y = layer(torch.randn(2, 3, 24, dtype=dtype))
    assert (y.dtype, y.shape) == (dtype, (2, 3, 10))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_with_bad_numbers_become_nan_and_no_others(bad: float) -> None:
    layer = Int8Linear.from_linear(_linear(16, 8))
    x = torch.randn(3, 16)
    good = layer(x)
    x[1, 5] = bad
    y = layer(x)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2]], good[[0, 2]], rtol=0, atol=0)


def test_zero_rows_give_the_bias_and_empty_batches_nothing() -> None:
    linear = _linear(16, 8)
    layer = Int8Linear.from_linear(linear)
    torch.testing.assert_close(layer(torch.zeros(2, 16)), linear.bias.expand(2, 8))
    assert layer(torch.zeros(0, 16)).shape == (0, 8)


def test_tiny_and_huge_activations_stay_finite() -> None:
    layer = Int8Linear.from_linear(_linear(16, 8, bias=False))
    for size in (1e-45, 1e-38, 1e38):
        assert layer(torch.full((1, 16), size)).isfinite().all()


def test_rows_of_zeros_and_of_tiny_weights_are_held() -> None:
    weight = torch.randn(3, 20)
    weight[1] = 0.0
    weight[2] = 1e-44
    ints, scale = torch.empty(3, 20, dtype=torch.int8), torch.empty(3)
    quantize_rows(weight, ints, scale)
    assert ints[1].eq(0).all()
    assert scale.gt(0).all()
    torch.testing.assert_close(ints.float() * scale[:, None], weight, atol=float(scale[0]), rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_weights_are_refused_by_name(bad: float) -> None:
    linear = _linear(16, 8)
    linear.weight.data[7, 3] = bad
    with pytest.raises(CompressionError, match=r"mlp\.up holds 1 NaN or infinite"):
        Int8Linear.from_linear(linear, name="mlp.up")


def test_state_survives_saving_and_a_cast_of_the_model_keeps_the_scales() -> None:
    layer = Int8Linear.from_linear(_linear(16, 8))
    other = Int8Linear(16, 8, bias=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 16)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    scale = layer.weight_scale.clone()
    layer.to(torch.bfloat16)
    assert layer.weight_scale.dtype == torch.float32
    assert layer.weight.dtype == torch.int8
    assert torch.equal(layer.weight_scale, scale)
