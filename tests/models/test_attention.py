"""Masks, biases and caps against their definitions, written out element by element."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from burnish.models.attention import AttentionSpec, FullCausal, alibi_slopes, visible

B, H, K, T, E = 2, 6, 2, 9, 4
SPEC = AttentionSpec(num_heads=H, num_kv_heads=K, head_dim=E, scale=0.4)


def by_definition(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
    out = torch.zeros(B, H, T, E)
    for b in range(B):
        for h in range(H):
            keys, values = k_BKTE[b, h * K // H], v_BKTE[b, h * K // H]
            for t in range(T):
                first = 0 if spec.window is None else max(0, t - spec.window + 1)
                scores = keys[first : t + 1] @ q_BHTE[b, h, t] * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                if spec.alibi_slopes_H is not None:
                    scores = scores - spec.alibi_slopes_H[h] * spec.alibi_scale * torch.arange(t - first, -1, -1)
                out[b, h, t] = torch.softmax(scores, 0) @ values[first : t + 1]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 9, 50])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_full_causal_equals_its_definition(window: int | None, alibi: bool, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q_BHTE = torch.randn(B, H, T, E, generator=generator)
    k_BKTE, v_BKTE = (torch.randn(B, K, T, E, generator=generator) for _ in range(2))
    slopes_H = torch.tensor(alibi_slopes(H)) if alibi else None
    spec = replace(SPEC, window=window, softcap=softcap, alibi_slopes_H=slopes_H, alibi_scale=0.5)
    out = FullCausal().attend(0, q_BHTE, k_BKTE, v_BKTE, spec)
    assert torch.allclose(out, by_definition(q_BHTE, k_BKTE, v_BKTE, spec), atol=1e-5)


def test_one_object_serves_layers_with_different_specs() -> None:
    q_BHTE = torch.randn(B, H, T, E, generator=torch.Generator().manual_seed(1))
    attention = FullCausal()
    for window in (None, 2, 5, 2):
        spec = replace(SPEC, window=window, num_kv_heads=H)
        fresh = FullCausal().attend(0, q_BHTE, q_BHTE, q_BHTE, spec)
        assert torch.equal(attention.attend(0, q_BHTE, q_BHTE, q_BHTE, spec), fresh)


def test_visible_takes_positions_per_sequence() -> None:
    query_positions = torch.tensor([[3], [1]])
    key_positions = torch.tensor([[0, 1, 2, 3, 4]]).expand(2, -1)
    mask = visible(query_positions, key_positions, 2)
    assert mask.tolist() == [[[False, False, True, True, False]], [[True, True, False, False, False]]]


@pytest.mark.parametrize("num_heads", [1, 2, 6, 7, 8, 12, 16, 71, 112])
def test_slopes_equal_transformers(num_heads: int) -> None:
    expected = _get_alibi_slopes(num_heads, torch.device("cpu"))
    assert torch.allclose(torch.tensor(alibi_slopes(num_heads)), expected, rtol=1e-5)


def test_bfloat16_bias_equals_falcon_up_to_a_constant_per_query() -> None:
    num_heads, length = 6, 700
    spec = replace(SPEC, alibi_slopes_H=torch.tensor(alibi_slopes(num_heads)), alibi_bfloat16=True)
    positions = torch.arange(length)
    bias_HTS = spec.alibi_bias(positions[-3:], positions)
    mask = torch.ones(1, length, dtype=torch.long)
    expected_H1S = build_alibi_tensor(mask, num_heads, torch.float32).view(num_heads, 1, length)
    difference = bias_HTS - expected_H1S
    assert torch.allclose(difference, difference[..., :1].expand_as(difference), atol=1e-4)
    assert float(bias_HTS[0, -1, -1]) == 0.0


def test_alibi_bias_takes_positions_per_sequence() -> None:
    spec = replace(SPEC, alibi_slopes_H=torch.tensor(alibi_slopes(H)))
    query_positions = torch.tensor([[5], [2]])
    key_positions = torch.tensor([[0, 5], [0, 2]])
    bias_BHTS = spec.alibi_bias(query_positions, key_positions)
    assert bias_BHTS.shape == (2, H, 1, 2)
    slope = alibi_slopes(H)[3]
    assert math.isclose(float(bias_BHTS[0, 3, 0, 0]), -5 * slope, rel_tol=1e-6)
    assert math.isclose(float(bias_BHTS[1, 3, 0, 0]), -2 * slope, rel_tol=1e-6)
    assert float(bias_BHTS[1, 3, 0, 1]) == 0.0
