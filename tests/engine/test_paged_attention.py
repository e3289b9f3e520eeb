"""Packed rows over blocks in any order attend as each sequence would alone, for every kind of attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from burnish.engine import paged_attention
from burnish.engine.paged_attention import KVStore, PagedAttention, quantize_tokens, untouched_zeros
from burnish.engine.step import StepInputs
from burnish.models.attention import AttentionSpec, FullCausal, alibi_slopes
from burnish.models.decoder import Decoder

H, K, E, P = 4, 2, 8, 4
CPU = torch.device("cpu")

SPECS = {
    "plain": {},
    "window": {"window": 5},
    "alibi": {"alibi_slopes_H": torch.tensor(alibi_slopes(H))},
    "softcap": {"softcap": 2.0},
    "window-softcap": {"window": 4, "softcap": 2.0},
    "window-alibi": {"window": 3, "alibi_slopes_H": torch.tensor(alibi_slopes(H))},
}


def step_of(rows: list[tuple[int, int]], tables: list[list[int]]) -> StepInputs:
    """Rows are (start, end) of each sequence."""
    counts = [end - start for start, end in rows]
    width = max(map(len, tables))
    return StepInputs(
        tokens_T=np.zeros(sum(counts), dtype=np.int32),
        positions_T=np.concatenate([np.arange(start, end, dtype=np.int32) for start, end in rows]),
        row_starts=np.cumsum([0, *counts], dtype=np.int32),
        context_lens_S=np.array([end for _, end in rows], dtype=np.int32),
        block_tables_SN=np.array([table + [-1] * (width - len(table)) for table in tables], dtype=np.int32),
        logit_rows_L=np.zeros(0, dtype=np.int32),
        adapters_S=np.full(len(rows), -1, dtype=np.int32),
        rope_lens_S=np.zeros(len(rows), dtype=np.int32),
    )


def run_steps(
    decoder: Decoder, spec: AttentionSpec, steps: list[list[tuple[int, int]]], *, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """What paged attention gives for every step's rows, and what each sequence gives alone."""
    store = KVStore(decoder.config, num_blocks=40, block_size=P, dtype=dtype, device=CPU)
    for tensor in (*store.keys, *store.values):
        tensor.fill_(77)
    generator = torch.Generator().manual_seed(0)
    lengths = [max(step[index][1] for step in steps) for index in range(len(steps[0]))]
    inputs = [[torch.randn(1, heads, length, E, generator=generator) for heads in (H, K, K)] for length in lengths]
    blocks = torch.randperm(40, generator=generator).tolist()
    tables = [[blocks.pop() for _ in range(-(-length // P))] for length in lengths]
    alone = [FullCausal().attend(0, *qkv, spec) for qkv in inputs]
    found, expected = [], []
    for rows in steps:
        cut = [table[: -(-end // P)] for table, (_, end) in zip(tables, rows)]
        if spec.window is not None:
            for table, (start, _) in zip(cut, rows):
                gone = max(0, start - spec.window + 1) // P
                table[:gone] = [-1] * gone
        attention = PagedAttention(step_of(rows, cut), store, windows={spec.window, None}, device=CPU)
        packed = [
            torch.cat([one[part][:, :, start:end] for one, (start, end) in zip(inputs, rows)], dim=2)
            for part in range(3)
        ]
        found.append(attention.attend(1, *packed, spec))
        expected.append(torch.cat([one[:, :, start:end] for one, (start, end) in zip(alone, rows)], dim=2))
    return found, expected


@pytest.mark.parametrize("name", sorted(SPECS))
def test_mixed_rows_equal_each_sequence_alone(decoder: Decoder, name: str) -> None:
    spec = AttentionSpec(num_heads=H, num_kv_heads=K, head_dim=E, scale=0.3, **SPECS[name])
    steps = [
        [(0, 3), (0, 9), (0, 5), (0, 4)],
        [(3, 4), (9, 14), (5, 6), (4, 9)],
        [(4, 5), (14, 15), (6, 9), (9, 10)],
        [(5, 6), (15, 16), (9, 10), (10, 11)],
        [(6, 9), (16, 19), (10, 13), (11, 14)],
    ]
    for found, expected in zip(*run_steps(decoder, spec, steps)):
        torch.testing.assert_close(found, expected)


def test_very_different_lengths_are_computed_apart(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "_FEW_TOKENS", 4)
    spec = AttentionSpec(num_heads=H, num_kv_heads=K, head_dim=E, scale=0.3)
    steps = [[(0, 2), (0, 60), (0, 3), (0, 50)], [(2, 3), (60, 61), (3, 4), (50, 51)]]
    for found, expected in zip(*run_steps(decoder, spec, steps)):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003), (torch.int8, 0.03)])
def test_smaller_stores_stay_close(decoder: Decoder, dtype: torch.dtype, tolerance: float) -> None:
    spec = AttentionSpec(num_heads=H, num_kv_heads=K, head_dim=E, scale=0.3)
    steps = [[(0, 9), (0, 5)], [(9, 10), (5, 6)], [(10, 13), (6, 7)]]
    for found, expected in zip(*run_steps(decoder, spec, steps, dtype=dtype)):
        assert (found - expected).norm() < tolerance * expected.norm()


def test_one_sequences_nan_stays_with_it(decoder: Decoder) -> None:
    spec = AttentionSpec(num_heads=H, num_kv_heads=K, head_dim=E, scale=0.3)
    store = KVStore(decoder.config, num_blocks=4, block_size=P, dtype=torch.float32, device=CPU)
    q, k, v = (torch.ones(1, heads, 8, E) for heads in (H, K, K))
    bad = torch.full_like(v, float("nan"))
    first = step_of([(0, 8)], [[0, 1]])
    PagedAttention(first, store, windows={None}, device=CPU).attend(0, q, k, bad, spec)
    second = step_of([(0, 3)], [[2]])
    parts = [x[:, :, :3] for x in (q, k, v)]
    PagedAttention(second, store, windows={None}, device=CPU).attend(0, *parts, spec)
    both = replace(step_of([(7, 8), (3, 4)], [[0, 1], [2]]))
    parts = [x[:, :, :2] for x in (q, k, v)]
    out_BHTE = PagedAttention(both, store, windows={None}, device=CPU).attend(0, *parts, spec)
    assert out_BHTE[:, :, 0].isnan().all()
    assert (out_BHTE[:, :, 1] == 1).all()


def test_without_store_rows_see_only_themselves(decoder: Decoder) -> None:
    spec = AttentionSpec(num_heads=H, num_kv_heads=K, head_dim=E, scale=0.3, window=3)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, 11, E, generator=generator) for heads in (H, K, K))
    attention = PagedAttention(step_of([(0, 4), (0, 7)], [[], []]), None, windows={3}, device=CPU)
    found = attention.attend(0, q, k, v, spec)
    for piece in (slice(0, 4), slice(4, 11)):
        parts = [x[:, :, piece] for x in (q, k, v)]
        torch.testing.assert_close(found[:, :, piece], FullCausal().attend(0, *parts, spec))


def test_quantized_tokens_are_within_half_a_step() -> None:
    x_TKE = torch.randn(7, 2, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 30.0])[:, None]
    x_TKE[3] = 0
    values, scales = quantize_tokens(x_TKE)
    assert values.dtype == torch.int8
    assert ((values * scales[..., None] - x_TKE).abs() <= 0.5001 * scales[..., None]).all()


def test_untouched_zeros_take_no_memory_before_they_are_written() -> None:
    psutil = pytest.importorskip("psutil")
    before = psutil.Process().memory_info().rss
    zeros = untouched_zeros((512, 1024, 1024), torch.bfloat16, CPU)
    assert zeros.dtype == torch.bfloat16
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
    assert not zeros[:3].any()
