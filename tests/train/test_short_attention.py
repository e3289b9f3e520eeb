"""Attention of short rows equals the fused one."""

from __future__ import annotations

import pytest
import torch

from burnish.models.attention import AttentionSpec, FullCausal
from burnish.train.short_attention import ShortCausal


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_short_rows_equal_the_fused_kernel_forward_and_backward(num_kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    spec = AttentionSpec(num_heads=6, num_kv_heads=num_kv_heads, head_dim=8, scale=0.4)
    shapes = [(2, 6, 11, 8), (2, num_kv_heads, 11, 8), (2, num_kv_heads, 11, 8)]
    exact = [torch.randn(shape, generator=generator).bfloat16().float().requires_grad_() for shape in shapes]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    out = ShortCausal().attend(0, *rounded, spec)
    assert type(out.grad_fn).__name__ != "ScaledDotProductFlashAttentionForCpuBackward0", "the plain path was not taken"
    expected = FullCausal().attend(0, *exact, spec)
    weights = torch.randn(out.shape, generator=generator)
    ours = torch.autograd.grad((out.float() * weights).sum(), rounded)
    theirs = torch.autograd.grad((expected * weights).sum(), exact)
    for mine, other in zip((out, *ours), (expected, *theirs)):
        assert mine.shape == other.shape
        assert (mine.float() - other).norm() < 0.02 * other.norm()


def test_windows_and_float32_go_to_the_general_attention() -> None:
    q = torch.randn(1, 2, 9, 4, requires_grad=True)
    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_dim=4, scale=0.5, window=3)
    assert torch.equal(ShortCausal().attend(0, q, q, q, spec), FullCausal().attend(0, q, q, q, spec))
    rounded = q.detach().bfloat16().requires_grad_()
    windowed = ShortCausal().attend(0, rounded, rounded, rounded, spec)
    assert torch.equal(windowed, FullCausal().attend(0, rounded, rounded, rounded, spec))
