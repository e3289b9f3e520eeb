"""Fine-tuning's compiled attention, forward and backward, against its torch twin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from burnish.kernels import training_reference as twin
from burnish.kernels.cpu.library import CpuLibrary
from burnish.kernels.cpu.training import TrainingKernels

# T tokens, H query heads, K kv heads, E head dim

DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (1, 7, 64, 33, 0, 172)


@pytest.fixture
def kernels(library: CpuLibrary) -> TrainingKernels:
    return TrainingKernels(library, threads=2)


def starts_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(lengths: tuple[int, ...], heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v as slices of one buffer, and the output's gradient as part of a wider one."""
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    tokens, width = sum(lengths), (heads + 2 * kv_heads) * dim
    buffer = torch.randn(tokens, width + 3, generator=generator).to(dtype)
    grad = torch.randn(tokens, heads * dim + 5, generator=generator).to(dtype)[:, 5:].unflatten(1, (heads, dim))
    q, k, v = buffer[:, :width].unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], dim=1)
    return [q, k, v, grad]


def run(
    kernels: TrainingKernels,
    tensors: list[Tensor],
    lengths: tuple[int, ...],
    *,
    window: int | None = None,
    slopes: Tensor | None = None,
) -> list[Tensor]:
    """Output, log-sum-exp and the three gradients, which go to slices of one buffer."""
    q, k, v, grad = tensors
    scale, starts = q.shape[2] ** -0.5, starts_of(lengths)
    out, lse = kernels.attention_forward(q, k, v, starts, scale=scale, window=window, slopes_H=slopes)
    buffer = torch.full((q.shape[0], q.shape[1] + 2 * k.shape[1], q.shape[2]), 7.0, dtype=q.dtype)
    grads = buffer.split([q.shape[1], k.shape[1], k.shape[1]], dim=1)
    kernels.attention_backward(
        grad, q, k, v, out, lse, starts, scale=scale, window=window, slopes_H=slopes,
        grad_q_NHE=grads[0], grad_k_NKE=grads[1], grad_v_NKE=grads[2],
    )  # fmt: skip
    return [out, lse, *grads]


def want(
    tensors: list[Tensor], lengths: tuple[int, ...], *, window: int | None = None, slopes: Tensor | None = None
) -> list[Tensor]:
    """The same of the twin, from float32 copies."""
    q, k, v, grad = (x.float() for x in tensors)
    scale, starts = q.shape[2] ** -0.5, starts_of(lengths)
    out, lse = twin.attention_forward(q, k, v, starts, scale=scale, window=window, slopes_H=slopes)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    twin.attention_backward(
        grad, q, k, v, out, lse, starts, scale=scale, window=window, slopes_H=slopes,
        grad_q_NHE=grads[0], grad_k_NKE=grads[1], grad_v_NKE=grads[2],
    )  # fmt: skip
    return [out, lse, *grads]


def check(got: list[Tensor], wanted: list[Tensor]) -> None:
    """In bfloat16 weights and their gradients are rounded as well, and errors add up over a row."""
    for place, (mine, theirs) in enumerate(zip(got, wanted)):
        if mine.dtype == torch.float32:
            # Scores are sums of bfloat16 products: exact but for their order.
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=5e-5)
        else:
            torch.testing.assert_close(mine.float(), theirs, rtol=0.02, atol=0.02 if place == 0 else 0.05)
            # Rounding goes both ways; a wrong term would not.
            error = (mine.float() - theirs).norm() / theirs.norm().clamp_min(0.1 * theirs.numel() ** 0.5)
            assert error < 0.006, (place, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 32, 64, 80, 96, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (2, 2)])
def test_attention_equals_the_twin(
    kernels: TrainingKernels, dtype: torch.dtype, dim: int, heads: int, kv_heads: int
) -> None:
    tensors = inputs(LENGTHS, heads, kv_heads, dim, dtype)
    check(run(kernels, tensors, LENGTHS), want(tensors, LENGTHS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 5, 32, 100])
def test_a_window_and_slopes_equal_the_twin(kernels: TrainingKernels, dtype: torch.dtype, window: int) -> None:
    tensors, slopes = inputs(LENGTHS, 4, 2, 64, dtype), torch.tensor([0.5, 0.1, 0.0, 0.02])
    check(run(kernels, tensors, LENGTHS, window=window), want(tensors, LENGTHS, window=window))
    got = run(kernels, tensors, LENGTHS, window=window, slopes=slopes)
    check(got, want(tensors, LENGTHS, window=window, slopes=slopes))
    check(run(kernels, tensors, LENGTHS, slopes=slopes), want(tensors, LENGTHS, slopes=slopes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 300])
def test_a_row_of_many_pieces_equals_the_twin(kernels: TrainingKernels, dtype: torch.dtype, window: int | None) -> None:
    lengths = (1000,)
    tensors = inputs(lengths, 2, 1, 64, dtype)
    check(run(kernels, tensors, lengths, window=window), want(tensors, lengths, window=window))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_stay_finite(kernels: TrainingKernels, dtype: torch.dtype) -> None:
    tensors = inputs((40,), 2, 1, 64, dtype)
    tensors[0].mul_(100)
    got, wanted = run(kernels, tensors, (40,)), want(tensors, (40,))
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got[0].float(), wanted[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row_and_rows_do_not_depend_on_each_other(
    kernels: TrainingKernels, dtype: torch.dtype
) -> None:
    lengths = (40, 30, 50)
    tensors = inputs(lengths, 4, 2, 64, dtype)
    clean = run(kernels, tensors, lengths)
    for tensor in tensors:
        tensor[45, 0, 3] = math.nan
    others = (torch.arange(120) < 40) | (torch.arange(120) >= 70)
    for got, before in zip(run(kernels, tensors, lengths), clean):
        assert torch.equal(got[others], before[others])
        assert got[45].isnan().any()
    alone = [tensor[70:] for tensor in tensors]
    for got, before in zip(run(kernels, alone, (50,)), clean):
        assert torch.equal(got, before[70:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_place_of_the_inputs_are_the_same(kernels: TrainingKernels, dtype: torch.dtype) -> None:
    lengths = (40, 172)
    tensors = inputs(lengths, 4, 2, 64, dtype)
    apart = run(kernels, tensors, lengths)
    q, k, v, grad = tensors
    kernels.attention_backward(
        grad, q, k, v, apart[0], apart[1], starts_of(lengths), scale=64**-0.5,
        grad_q_NHE=q, grad_k_NKE=k, grad_v_NKE=v,
    )  # fmt: skip
    for got, before in zip((q, k, v), apart[2:]):
        assert torch.equal(got, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_depend_on_the_number_of_threads(library: CpuLibrary, dtype: torch.dtype) -> None:
    tensors = inputs(LENGTHS, 6, 2, 64, dtype)
    one, three = (run(TrainingKernels(library, threads=threads), tensors, LENGTHS) for threads in (1, 3))
    for mine, theirs in zip(one, three):
        assert torch.equal(mine, theirs)


def test_its_own_team_computes_the_same_as_torchs_threads(library: CpuLibrary) -> None:
    kernels = TrainingKernels(library, threads=3)
    tensors = inputs(LENGTHS, 6, 2, 64, torch.bfloat16)
    before = run(kernels, tensors, LENGTHS)
    kernels._functions["use_openmp"](None)
    for mine, theirs in zip(run(kernels, tensors, LENGTHS), before):
        assert torch.equal(mine, theirs)
    TrainingKernels(library)


def test_sequences_that_end_before_they_begin_are_refused(kernels: TrainingKernels) -> None:
    q, k, v, _ = inputs((40,), 2, 1, 64, torch.float32)
    starts = torch.tensor([0, 90, 10, 40], dtype=torch.int32)
    with pytest.raises(AssertionError, match="end before they begin"):
        kernels.attention_forward(q, k, v, starts, scale=1.0)
