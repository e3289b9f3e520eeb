"""Fine-tuning's compiled row kernels against their torch twins; the twins against torch's gradients stand beside."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from burnish.errors import DataError
from burnish.kernels import training_reference as twin
from burnish.kernels.cpu.library import CpuLibrary
from burnish.kernels.cpu.training import NormKind, TrainingKernels

WIDTHS = (1, 7, 64, 172, 1000)
DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "quick_gelu", "identity")
NORMS: list[tuple[NormKind, float]] = [("rmsnorm", 0.0), ("rmsnorm", 1.0), ("layernorm", 0.0)]


@pytest.fixture
def kernels(library: CpuLibrary) -> TrainingKernels:
    return TrainingKernels(library, threads=2)


def strided(rows: int, width: int, dtype: torch.dtype, *, seed: int, scale: float = 1.0) -> Tensor:
    """Rows that lie apart: part of a wider buffer, and not its beginning."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width + 9, generator=generator) * scale).to(dtype)[:, 5 : 5 + width]


def check(got: Tensor, want: Tensor, *, rtol: float = 2e-5, atol: float = 2e-5) -> None:
    """One step of bfloat16 apart where that is the dtype: sums in another order may round the other way."""
    assert got.dtype == want.dtype
    if want.dtype == torch.bfloat16:
        rtol, atol = max(rtol, 1 / 128), max(atol, 1e-5)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "offset"), NORMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_equals_the_twin(
    kernels: TrainingKernels, dtype: torch.dtype, kind: NormKind, offset: float, width: int
) -> None:
    for weight_dtype in {dtype, torch.float32}:
        x, grad, residual = (strided(70, width, dtype, seed=width + place) for place in range(3))
        weight = torch.randn(width).to(weight_dtype)
        bias = torch.randn(width).to(weight_dtype) if kind == "layernorm" else None
        y, stats = kernels.norm_forward(x, weight, bias, kind=kind, eps=1e-5, offset=offset)
        want_y, want_stats = twin.norm_forward(x, weight, bias, kind=kind, eps=1e-5, offset=offset)
        check(y, want_y)
        check(stats, want_stats, rtol=1e-4)
        assert torch.equal(kernels.norm_again(x, weight, bias, stats, kind=kind, offset=offset), y)
        got = kernels.norm_backward(
            grad, x, weight, stats, kind=kind, offset=offset, grad_residual_ND=residual, weight_grads=True
        )
        want = twin.norm_backward(grad, x, weight, stats, kind=kind, offset=offset, grad_residual_ND=residual)
        # One value less its own mean is nothing but rounding times 1 / sqrt(eps).
        slack = 2e-3 if width == 1 else 1e-4
        check(got[0], want[0], rtol=1e-4, atol=max(slack, 0.02 if dtype == torch.bfloat16 else 0.0))
        for mine, theirs in zip(got[1:], want[1:]):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                # A normed value may round the other way before it is multiplied.
                check(mine, theirs, rtol=1e-4, atol=0.05 if dtype == torch.bfloat16 else 1e-3 if width == 1 else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_backward_in_place_of_the_residual_gives_the_same(kernels: TrainingKernels, dtype: torch.dtype) -> None:
    x, grad, residual = (strided(33, 172, dtype, seed=place) for place in range(3))
    weight = torch.randn(172).to(dtype)
    _, stats = kernels.norm_forward(x, weight, kind="rmsnorm", eps=1e-5)
    apart, *none = kernels.norm_backward(grad, x, weight, stats, kind="rmsnorm", grad_residual_ND=residual)
    assert none == [None, None]
    kernels.norm_backward(grad, x, weight, stats, kind="rmsnorm", grad_residual_ND=residual, out=residual)
    assert torch.equal(residual, apart)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_gate_equals_the_twin(kernels: TrainingKernels, dtype: torch.dtype, activation: str, width: int) -> None:
    gate, up, grad = (strided(33, width, dtype, seed=width + place, scale=3.0) for place in range(3))
    product = kernels.gate_forward(gate, up, activation=activation)
    check(product, twin.gate_forward(gate, up, activation=activation))
    check(kernels.activation_forward(gate, activation=activation), twin.activation_forward(gate, activation=activation))
    want = twin.gate_backward(grad, gate, up, activation=activation)
    check(
        kernels.activation_backward(grad, gate, activation=activation),
        twin.activation_backward(grad, gate, activation=activation),
    )
    again = torch.empty_like(grad)
    kernels.gate_backward(grad, gate, up, activation=activation, grad_gate_NI=gate, grad_up_NI=up, product_NI=again)
    for got, wanted in zip((gate, up, again), want):
        check(got, wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivative_of_large_numbers_is_finite(kernels: TrainingKernels, activation: str) -> None:
    x = torch.tensor([[1e30, -1e30, 100.0, -100.0, 30.0, -30.0, 0.0, -0.0, 1e-30, 3e38, -3e38]])
    got = kernels.activation_backward(torch.ones_like(x), x, activation=activation)
    want = twin.activation_backward(torch.ones_like(x).double(), x.double().clamp(-1e3, 1e3), activation=activation)
    check(got, want.float(), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "pairs"), [(2, 1), (14, 7), (64, 32), (80, 20), (128, 64)])
def test_rotation_equals_the_twin_and_its_inverse_undoes_it(
    kernels: TrainingKernels, dtype: torch.dtype, interleaved: bool, head_dim: int, pairs: int
) -> None:
    x = strided(33, 3 * head_dim, dtype, seed=head_dim).unflatten(1, (3, head_dim))
    angles = torch.rand(33, pairs) * 6
    cos, sin = angles.cos(), angles.sin()
    before, around = x.clone(), x._base.clone()  # type: ignore[union-attr]
    want = twin.rotate_(x.clone(), cos, sin, interleaved=interleaved)
    assert kernels.rotate_(x, cos, sin, interleaved=interleaved) is x
    check(x, want)
    assert torch.equal(x._base[:, :5], around[:, :5])  # type: ignore[index]
    assert torch.equal(x._base[:, -4:], around[:, -4:])  # type: ignore[index]
    kernels.rotate_(x, cos, sin, interleaved=interleaved, inverse=True)
    check(x, before, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_cross_entropy_equals_the_twin(
    kernels: TrainingKernels, dtype: torch.dtype, softcap: float | None, width: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    logits = (torch.randn(37, width, generator=generator) * 4).to(dtype)
    labels = torch.randint(0, width, (37,), generator=generator)
    labels[::5] = -100
    kept = logits.clone()
    loss = kernels.cross_entropy_(logits, labels, softcap=softcap, grad=False)
    assert torch.equal(logits, kept)
    assert kernels.cross_entropy_(logits, labels, softcap=softcap, grad_scale=0.5) == loss
    assert twin.cross_entropy_(kept, labels, softcap=softcap, grad_scale=0.5) == pytest.approx(loss, rel=1e-5, abs=1e-5)
    check(logits, kept, atol=1e-6)
    assert not logits[::5].any()


def test_cross_entropy_refuses_a_label_outside_the_vocabulary(kernels: TrainingKernels) -> None:
    logits = torch.randn(3, 20)
    kept = logits.clone()
    for label in (20, -1, 2**40):
        with pytest.raises(DataError, match="outside the vocabulary"):
            kernels.cross_entropy_(logits, torch.tensor([0, label, -100]))
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_spoils_that_row_only(kernels: TrainingKernels, dtype: torch.dtype, bad: float) -> None:
    clean = strided(70, 40, dtype, seed=1).contiguous()
    spoiled = clean.clone()
    spoiled[50, 11] = bad
    others = torch.arange(70) != 50
    weight, labels = torch.randn(40).to(dtype), torch.arange(70) % 40

    def results(x: Tensor) -> list[Tensor]:
        y, stats = kernels.norm_forward(x, weight, kind="rmsnorm", eps=1e-5)
        grad_x, _, _ = kernels.norm_backward(clean, x, weight, stats, kind="rmsnorm")
        logits = x.clone()
        kernels.cross_entropy_(logits, labels)
        return [y, grad_x, kernels.activation_backward(clean, x, activation="silu"), logits]

    for place, (got, want) in enumerate(zip(results(spoiled), results(clean))):
        assert torch.equal(got[others], want[others])
        if place != 2:
            assert got[50].isnan().any()
    assert math.isnan(kernels.cross_entropy_(spoiled, labels, grad=False))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(library: CpuLibrary, dtype: torch.dtype) -> None:
    x, grad = strided(500, 172, dtype, seed=1), strided(500, 172, dtype, seed=2)
    weight, labels = torch.randn(172).to(dtype), torch.arange(500) % 172
    seen = []
    for threads in (1, 3):
        kernels = TrainingKernels(library, threads=threads)
        y, stats = kernels.norm_forward(x, weight, kind="layernorm", eps=1e-5)
        grads = kernels.norm_backward(grad, x, weight, stats, kind="layernorm", weight_grads=True)
        logits = x.clone().contiguous()
        loss = kernels.cross_entropy_(logits, labels)
        seen.append([y, stats, *grads, logits, torch.tensor(loss)])
    for one, three in zip(*seen):
        assert torch.equal(one, three)  # type: ignore[arg-type]


def test_passes_without_rows_do_nothing(kernels: TrainingKernels) -> None:
    x, weight = torch.empty(0, 20), torch.ones(20)
    y, stats = kernels.norm_forward(x, weight, kind="rmsnorm", eps=1e-5)
    assert y.shape == (0, 20)
    _, grad_weight, _ = kernels.norm_backward(x, x, weight, stats, kind="rmsnorm", weight_grads=True)
    assert torch.equal(grad_weight, torch.zeros(20))  # type: ignore[arg-type]
    assert kernels.cross_entropy_(x, torch.empty(0, dtype=torch.int64)) == 0.0
