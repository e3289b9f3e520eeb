"""The torch twins against torch's own functions and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from burnish.kernels import reference
from burnish.models.attention import AttentionSpec, FullCausal, alibi_slopes
from burnish.models.rope import Rope


def test_activations_round_half_to_even() -> None:
    ints, scale = reference.quantize_activations(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert ints.tolist() == [[127, 0, 2, 2, 0, -2]]
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_activations_without_a_largest_become_nan(bad: float) -> None:
    ints, scale = reference.quantize_activations(torch.tensor([[1.0, bad], [3.0, 1.0]]))
    assert ints[0].tolist() == [0, 0]
    assert scale.isnan().tolist() == [True, False]


@pytest.mark.parametrize("num_inputs", [1, 2, 7, 64, 4096])
def test_integer_product_is_exact(num_inputs: int) -> None:
    ints = torch.full((2, num_inputs), 127, dtype=torch.int8)
    assert reference.integer_product(ints, ints[:1]).tolist() == [[num_inputs * 127.0 * 127]] * 2
    ints, weight = (torch.randint(-127, 128, (rows, num_inputs)).to(torch.int8) for rows in (3, 5))
    want = (ints.long()[:, None] * weight.long()).sum(dim=-1)
    assert torch.equal(reference.integer_product(ints, weight), want.float())


def test_grouped_linear_equals_the_weight_it_stands_for() -> None:
    ints_NK = torch.randint(0, 16, (3, 20)).to(torch.uint8)
    scales_NG, zeros_NG = torch.rand(3, 3).to(torch.float16), torch.randint(0, 16, (3, 3)).to(torch.uint8)
    order_K = torch.randperm(20)
    weight_NK = torch.empty(3, 20)
    for n in range(3):
        for j in range(20):
            group = j // 8
            centred = int(ints_NK[n, j]) - int(zeros_NG[n, group])
            weight_NK[n, order_K[j]] = centred * float(scales_NG[n, group])
    x_MK = torch.randint(-127, 128, (4, 20)).float()
    x_MK[:, 0] = 127.0
    got_MN = reference.linear_grouped(x_MK, ints_NK, scales_NG, zeros_NG, group_size=8, order_K=order_K)
    torch.testing.assert_close(got_MN, x_MK @ weight_NK.t(), rtol=1e-5, atol=1e-3)


def test_requantized_weight_is_within_half_a_step() -> None:
    ints_NK = torch.randint(0, 16, (6, 40)).to(torch.uint8)
    scales_NG, zeros_NG = torch.rand(6, 3).to(torch.float16), torch.randint(0, 16, (6, 3)).to(torch.uint8)
    whole_NK, scale_N = reference.requantized(ints_NK, scales_NG, zeros_NG, group_size=16)
    eye = torch.eye(40) * 127
    weight_NK = reference.linear_grouped(eye, ints_NK, scales_NG, zeros_NG, group_size=16).t() / 127
    assert ((whole_NK.float() * scale_N[:, None] - weight_NK).abs() <= 0.501 * scale_N[:, None]).all()
    assert whole_NK.abs().amax(dim=1).eq(127).all()


def test_norms_equal_torchs() -> None:
    x, weight, bias = torch.randn(5, 36), torch.randn(36), torch.randn(36)
    torch.testing.assert_close(reference.rms_norm(x, weight, eps=1e-5), F.rms_norm(x, (36,), weight, 1e-5))
    torch.testing.assert_close(
        reference.layer_norm(x, weight, bias, eps=1e-5), F.layer_norm(x, (36,), weight, bias, 1e-5)
    )


def test_arg_max_takes_the_lowest_of_equals_and_refuses_nan() -> None:
    rows = torch.tensor([[1.0, 3.0, 3.0], [-math.inf] * 3, [math.inf, math.nan, 0.0], [math.inf, 0.0, math.inf]])
    assert reference.arg_max(rows).tolist() == [1, 0, -1, 0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_equals_the_decoders(interleaved: bool) -> None:
    rope = Rope(rotary_dim=8, theta=100.0, max_position_embeddings=64, interleaved=interleaved)
    table = rope.table(torch.arange(7)[None], dtype=torch.float32)
    x_THE = torch.randn(7, 3, 12)
    got = reference.rotate(x_THE, table.cos[0, :, 0], table.sin[0, :, 0], interleaved=interleaved)
    torch.testing.assert_close(got, table.rotate(x_THE[None])[0])


@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "alibi", "alibi_bfloat16"])
def test_attention_equals_the_decoders(kind: str) -> None:
    """Also from the middle on, and through a table of scattered blocks."""
    length, heads, kv_heads, dim = 37, 6, 2, 10
    slopes_H = torch.tensor(alibi_slopes(heads)) if kind.startswith("alibi") else None
    spec = AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scale=0.3,
        window=9 if kind == "window" else None,
        softcap=2.0 if kind == "softcap" else None,
        alibi_slopes_H=slopes_H,
        alibi_scale=0.5,
        alibi_bfloat16=kind == "alibi_bfloat16",
    )
    q, k, v = (torch.randn(1, count, length, dim) for count in (heads, kv_heads, kv_heads))
    want_THE = FullCausal().attend(0, q, k, v, spec)[0].transpose(0, 1)
    table = torch.tensor([4, 0, 2])
    keys, values = torch.full((5, 16, kv_heads, dim), torch.nan), torch.full((5, 16, kv_heads, dim), torch.nan)
    for token in range(length):
        keys[table[token // 16], token % 16] = k[0, :, token]
        values[table[token // 16], token % 16] = v[0, :, token]
    positions_T = torch.arange(20, length)
    bias = None
    if slopes_H is not None:
        bias = reference.alibi_bias(slopes_H, positions_T, length, scale=spec.alibi_scale, bfloat16=spec.alibi_bfloat16)
    got_THE = reference.attention(
        q[0].transpose(0, 1)[20:],
        reference.gather_blocks(keys, table, length),
        reference.gather_blocks(values, table, length),
        positions_T,
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap or 0.0,
        alibi_HTS=bias,
    )
    torch.testing.assert_close(got_THE, want_THE[20:], rtol=1e-4, atol=1e-5)


def test_freed_blocks_read_as_zeros() -> None:
    blocks = torch.ones(2, 16, 1, 4)
    gathered = reference.gather_blocks(blocks, torch.tensor([-1, 1]), 20)
    assert gathered[:16].eq(0).all()
    assert gathered[16:].eq(1).all()


def test_cached_keys_are_within_half_a_step() -> None:
    x_TJE = torch.randn(4, 2, 8)
    step_TJ1 = x_TJE.abs().amax(dim=-1, keepdim=True) / 127
    assert ((reference.cached(x_TJE, torch.int8) - x_TJE).abs() <= 0.501 * step_TJ1).all()
    assert torch.equal(reference.cached(x_TJE, torch.bfloat16), x_TJE.bfloat16().float())
    assert torch.equal(reference.cached(x_TJE, torch.float32), x_TJE)
