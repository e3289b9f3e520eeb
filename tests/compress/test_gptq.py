from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.compress import gptq, rtn
from burnish.compress.gptq import inverse_factor
from burnish.compress.quantized_weight import fit_grid
from burnish.compress.relative_error import relative_error
from burnish.errors import CompressionError

SIZE = 72


def _inputs(seed: int = 0, *, tokens: int = 400, spread: float = 8.0) -> Tensor:
    """Correlated inputs of uneven strength."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(SIZE, SIZE, generator=generator)
    strength = torch.logspace(0, 1, SIZE).log() * spread / 2 + 0.3
    low = torch.randn(tokens, SIZE, generator=generator) @ mix / SIZE**0.5
    return (low + 0.5 * low.roll(1, 1)) * strength


def _hessian(**options: float) -> Tensor:
    inputs = _inputs(**options)  # pyright: ignore[reportArgumentType]
    return inputs.t() @ inputs


def _weight(rows: int = 40) -> Tensor:
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(9))


def _reference(weight: Tensor, hessian: Tensor, *, bits: int, width: int, damping: float = 0.01) -> Tensor:
    """The algorithm as the paper states it: one column at a time, every later column updated at once, in float64."""
    work = weight.double().clone()
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(SIZE, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    result = torch.zeros_like(work)
    for column in range(SIZE):
        if column % width == 0:
            grid = fit_grid(work[:, column : column + width].float(), bits=bits, symmetric=True)
        value = work[:, column].clone()
        result[:, column] = grid.to_weights(grid.to_ints(value.float()[:, None]))[:, 0].double()
        error = (value - result[:, column]) / upper[column, column]
        work[:, column:] -= error[:, None] * upper[column, column:][None]
    return result


@pytest.mark.parametrize(("width", "block_size"), [(SIZE, 16), (16, 128), (20, 32), (24, 24)])
def test_result_equals_the_paper_column_by_column(width: int, block_size: int) -> None:
    weight, hessian = _weight(), _hessian()
    quantized = gptq.quantize_weight(weight, hessian, bits=4, group_size=width, block_size=block_size)
    expected = _reference(weight, hessian, bits=4, width=width)
    # A value on the edge between two grid points may fall to either side in float32; then few entries differ.
    same = torch.isclose(quantized.dequantize().double(), expected, atol=1e-4)
    assert same.double().mean() > 0.97
    ours, theirs = (_output_error(weight, each, hessian) for each in (quantized.dequantize(), expected.float()))
    assert ours == pytest.approx(theirs, rel=0.02)


def _output_error(weight: Tensor, restored: Tensor, hessian: Tensor) -> float:
    lost = restored - weight
    return float(((lost @ hessian) * lost).sum().sqrt())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 20])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("activation_order", [True, False])
def test_output_error_is_below_rounding_on_correlated_inputs(
    bits: int, group_size: int, symmetric: bool, activation_order: bool
) -> None:
    weight, hessian = _weight(), _hessian()
    ours = gptq.quantize_weight(
        weight,
        hessian,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        activation_order=activation_order,
    )
    rounded = rtn.quantize_weight(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    assert relative_error(weight, ours.dequantize(), hessian) < 0.8 * relative_error(
        weight, rounded.dequantize(), hessian
    )


def test_uncorrelated_inputs_give_plain_rounding() -> None:
    weight = _weight()
    quantized = gptq.quantize_weight(weight, torch.eye(SIZE), bits=4)
    assert torch.equal(quantized.ints, rtn.quantize_weight(weight, bits=4).ints)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_of_the_hessian_does_not_matter(scale: float) -> None:
    weight, hessian = _weight(), _hessian()
    plain = gptq.quantize_weight(weight, hessian, bits=4)
    scaled = gptq.quantize_weight(weight, hessian * scale, bits=4)
    assert (plain.ints == scaled.ints).float().mean() > 0.995


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    hessian = _hessian()
    upper = inverse_factor(hessian, damping=0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(SIZE)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.double().t() @ upper.double(), torch.linalg.inv(damped.double()), rtol=1e-3, atol=1e-7)


def test_activation_order_groups_the_strongest_columns_first() -> None:
    hessian = _hessian()
    quantized = gptq.quantize_weight(_weight(), hessian, bits=4, group_size=16, activation_order=True)
    strongest = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    for position, column in enumerate(strongest.tolist()):
        assert quantized.g_idx[column] == position // 16


def test_columns_without_activations_are_rounded_alone() -> None:
    inputs = _inputs()
    inputs[:, [3, 40]] = 0.0
    weight, hessian = _weight(), inputs.t() @ inputs
    quantized = gptq.quantize_weight(weight, hessian, bits=4, group_size=-1)
    rounded = rtn.quantize_weight(weight, bits=4, group_size=-1)
    assert torch.equal(quantized.ints[:, [3, 40]], rounded.ints[:, [3, 40]])
    assert relative_error(weight, quantized.dequantize(), hessian) < relative_error(
        weight, rounded.dequantize(), hessian
    )


def test_all_zero_hessian_gives_plain_rounding() -> None:
    weight = _weight()
    quantized = gptq.quantize_weight(weight, torch.zeros(SIZE, SIZE), bits=4)
    assert torch.equal(quantized.ints, rtn.quantize_weight(weight, bits=4).ints)


def test_fewer_tokens_than_columns_need_only_the_damping() -> None:
    inputs = _inputs(tokens=5)
    quantized = gptq.quantize_weight(_weight(), inputs.t() @ inputs, bits=4)
    assert torch.isfinite(quantized.dequantize()).all()


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_weights_are_handled(value: float) -> None:
    weight = torch.full((6, SIZE), value)
    restored = gptq.quantize_weight(weight, _hessian(), bits=4, symmetric=False, group_size=16).dequantize()
    assert torch.allclose(restored, weight, atol=0.02)


def test_same_inputs_give_the_same_bits_and_nothing_is_modified() -> None:
    weight, hessian = _weight(), _hessian()
    kept = weight.clone(), hessian.clone()
    first, second = (
        gptq.quantize_weight(weight, hessian, bits=4, group_size=16, activation_order=True, scale_search=True)
        for _ in range(2)
    )
    assert torch.equal(first.ints, second.ints)
    assert torch.equal(first.scales, second.scales)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


def test_one_column_and_one_row_are_handled_without_modifying_them() -> None:
    weight = torch.tensor([[0.5], [-1.0]])
    quantized = gptq.quantize_weight(weight, torch.tensor([[2.0]]), bits=8)
    assert torch.allclose(quantized.dequantize(), weight, rtol=0.01)
    assert weight.flatten().tolist() == [0.5, -1.0]


def test_damaged_weights_are_refused_by_name() -> None:
    weight = _weight()
    weight[0, 0] = float("nan")
    with pytest.raises(CompressionError, match="q_proj holds 1 NaN"):
        gptq.quantize_weight(weight, _hessian(), bits=4, name="q_proj")


def test_damaged_activations_are_refused_by_name() -> None:
    hessian = _hessian()
    hessian[0, 1] = float("inf")
    with pytest.raises(CompressionError, match="activations of q_proj"):
        gptq.quantize_weight(_weight(), hessian, bits=4, name="q_proj")


def test_hessian_that_is_not_positive_definite_names_the_damping() -> None:
    hessian = -torch.eye(SIZE) + 2 * torch.diag(torch.arange(SIZE).float())
    hessian[0, 1] = hessian[1, 0] = 500.0
    with pytest.raises(CompressionError, match=r"not positive definite.*Raise the damping"):
        gptq.quantize_weight(_weight(), hessian, bits=4)


def test_hessian_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(CompressionError, match="does not fit"):
        gptq.quantize_weight(_weight(), torch.eye(3), bits=4)


def test_output_error_of_the_weight_itself_is_zero() -> None:
    quantized = rtn.quantize_weight(_weight(), bits=8)
    exact = quantized.dequantize()
    assert relative_error(exact, quantized.dequantize(), _hessian()) == 0.0
    assert (
        relative_error(torch.zeros(2, SIZE), rtn.quantize_weight(torch.zeros(2, SIZE), bits=4).dequantize(), None)
        == 0.0
    )
