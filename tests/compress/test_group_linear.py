from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from burnish.compress import group_linear
from burnish.compress.gptq import quantize_weight as gptq_weight
from burnish.compress.group_linear import PACKED, GroupQuantizedLinear
from burnish.compress.quantized_weight import QuantizedWeight
from burnish.compress.rtn import quantize_weight
from burnish.errors import CheckpointError

OUT, IN = 19, 52


def _quantized(
    *, bits: int = 4, group_size: int = 16, symmetric: bool = True, activation_order: bool = False
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator)
    if not activation_order:
        return quantize_weight(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    inputs = torch.randn(200, IN, generator=generator) * torch.rand(IN, generator=generator)
    return gptq_weight(
        weight, inputs.t() @ inputs, bits=bits, group_size=group_size, symmetric=symmetric, activation_order=True
    )


def _bias() -> torch.Tensor:
    return torch.randn(OUT, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 13, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activation_order", [True, False])
def test_forward_equals_the_dequantized_linear(
    bits: int, group_size: int, symmetric: bool, activation_order: bool
) -> None:
    quantized = _quantized(bits=bits, group_size=group_size, symmetric=symmetric, activation_order=activation_order)
    layer = GroupQuantizedLinear.from_quantized(quantized, bias=_bias())
    for shape in ((1, IN), (2, 5, IN), (0, IN)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(layer(x), F.linear(x, quantized.dequantize(), _bias()), atol=1e-4)


@pytest.mark.parametrize("activation_order", [True, False])
def test_dequantized_fills_the_memory_it_is_given(activation_order: bool) -> None:
    layer = GroupQuantizedLinear.from_quantized(_quantized(activation_order=activation_order))
    want = layer.dequantize()
    torch.testing.assert_close(layer.dequantized(torch.float32), want)
    buffer = torch.full((OUT + 3, IN), 7.0)
    torch.testing.assert_close(layer.dequantized(torch.float32, out_OI=buffer[1 : OUT + 1]), want)
    torch.testing.assert_close(buffer[1 : OUT + 1], want)
    assert (buffer[[0, -2, -1]] == 7).all()


def test_forward_in_bfloat16_stays_near_the_dequantized_linear() -> None:
    quantized = _quantized(symmetric=False)
    layer = GroupQuantizedLinear.from_quantized(quantized, bias=_bias())
    x = torch.randn(6, IN, generator=torch.Generator().manual_seed(1))
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    exact = F.linear(x, quantized.dequantize(), _bias())
    assert (y.float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_weight_rebuilt_in_slabs_gives_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = _quantized()
    layer = GroupQuantizedLinear.from_quantized(quantized)
    x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1))
    whole = layer(x)
    monkeypatch.setattr(group_linear, "SLAB_WEIGHTS", 3 * IN)
    assert torch.allclose(layer(x), whole, atol=1e-5)


def test_weights_are_in_memory_once_in_either_state() -> None:
    layer = GroupQuantizedLinear.from_quantized(_quantized())
    assert {name for name, _ in layer.named_buffers()} == set(PACKED)
    layer.prepare()
    names = {name for name, _ in layer.named_buffers()}
    assert names == {"centred", "group_scales", "group_zeros", "column_groups"}
    assert layer.centred is not None
    assert layer.centred.dtype == torch.int8


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_release_restores_the_packed_tensors_exactly(bits: int, activation_order: bool) -> None:
    layer = GroupQuantizedLinear.from_quantized(
        _quantized(bits=bits, symmetric=False, activation_order=activation_order)
    )
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.prepare()
    prepared = layer.state_dict()
    layer.release()
    after = layer.state_dict()
    for name in PACKED:
        assert torch.equal(before[name], prepared[name])
        assert torch.equal(before[name], after[name])


def test_state_dict_loads_into_another_layer_that_has_run() -> None:
    quantized = _quantized(activation_order=True)
    source = GroupQuantizedLinear.from_quantized(quantized)
    other = GroupQuantizedLinear.from_quantized(_quantized())
    other(torch.zeros(1, IN))
    other.load_state_dict(source.state_dict())
    assert torch.equal(other.dequantize(), quantized.dequantize())
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(1))
    assert torch.equal(other(x), source(x))


@pytest.mark.parametrize("prepared", [True, False])
def test_casting_the_model_does_not_change_its_weights(prepared: bool) -> None:
    layer = GroupQuantizedLinear.from_quantized(_quantized(), bias=_bias())
    before = layer.dequantize()
    if prepared:
        layer.prepare()
    nn.Sequential(layer).to(torch.bfloat16)
    assert layer.scales_dtype == torch.float16
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), before)


def test_gradient_reaches_the_input_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_linear, "SLAB_WEIGHTS", 5 * IN)
    quantized = _quantized(activation_order=True)
    layer = GroupQuantizedLinear.from_quantized(quantized, bias=_bias())
    x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1), requires_grad=True)
    layer(x).square().sum().backward()
    gradient = x.grad
    twin = x.detach().clone().requires_grad_()
    F.linear(twin, quantized.dequantize(), _bias()).square().sum().backward()
    assert gradient is not None
    assert twin.grad is not None
    assert torch.allclose(gradient, twin.grad, rtol=1e-4, atol=1e-3)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_zero_points_stored_as_they_are_read_back_alike() -> None:
    quantized = _quantized(symmetric=False)
    older = GroupQuantizedLinear.from_quantized(quantized, zero_offset=1)
    newer = GroupQuantizedLinear.from_quantized(quantized, zero_offset=0)
    assert not torch.equal(older.qzeros, newer.qzeros)  # pyright: ignore[reportArgumentType]
    assert torch.equal(older.dequantize(), newer.dequantize())


def test_symmetric_zero_points_are_stored_as_the_common_pattern() -> None:
    layer = GroupQuantizedLinear.from_quantized(
        quantize_weight(torch.randn(16, IN, generator=torch.Generator().manual_seed(0)), bits=4)
    )
    assert layer.qzeros is not None
    assert set(layer.qzeros.flatten().tolist()) == {0x77777777}


def test_group_order_left_at_zero_means_plain_order() -> None:
    quantized = _quantized()
    layer = GroupQuantizedLinear.from_quantized(quantized)
    layer.g_idx = torch.zeros(IN, dtype=torch.int32)
    assert torch.equal(layer.dequantize(), quantized.dequantize())


def test_group_order_that_fills_no_group_evenly_still_runs() -> None:
    quantized = _quantized()
    uneven = QuantizedWeight(
        ints=quantized.ints,
        scales=quantized.scales,
        zeros=quantized.zeros,
        g_idx=torch.tensor([0] * 3 + [3] * 30 + [1] * 19, dtype=torch.int32),
        bits=4,
        group_size=16,
    )
    layer = GroupQuantizedLinear.from_quantized(uneven)
    x = torch.randn(4, IN, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(layer(x), F.linear(x, uneven.dequantize()), atol=1e-4)
    layer.release()
    assert torch.equal(layer.dequantize(), uneven.dequantize())


def test_group_order_beyond_the_scales_is_refused() -> None:
    layer = GroupQuantizedLinear.from_quantized(_quantized())
    layer.g_idx = torch.full((IN,), 9, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"expected 0\.\.3"):
        layer(torch.zeros(1, IN))
