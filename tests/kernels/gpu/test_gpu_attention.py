"""Paged attention and the cache's writer equal their torch twins over mixed rows, windows, biases and cache dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from near import MATRIX_DTYPES, assert_near, normal
from torch import Tensor

pytest.importorskip("triton", reason="triton comes with the gpu extra")

from burnish.kernels.gpu import twins
from burnish.kernels.gpu.attention import CacheLayer, PagedRows, ScoreRule, paged_attention, splits_for
from burnish.kernels.gpu.rope_write import rope_and_write
from burnish.kernels.gpu.support import AttentionTiles, against_capability, attention_tiles

F32 = torch.float32
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(kw_only=True)
class Case:
    """Rows of (new tokens, tokens in the cache) over a cache of random numbers, NaN wherever nothing was written."""

    q: Tensor
    cache: CacheLayer
    rows: PagedRows
    new: list[int]

    def tiles(self, per_tile: int) -> tuple[Tensor, Tensor]:
        starts = self.rows.row_starts.tolist()
        pairs = [
            (sequence, first)
            for sequence, (begin, end) in enumerate(pairwise(starts))
            for first in range(begin, end, per_tile)
        ]
        both = torch.tensor(pairs, dtype=torch.int32, device=self.q.device).reshape(-1, 2)
        return both[:, 0].contiguous(), both[:, 1].contiguous()


def make_case(
    device: torch.device,
    *,
    rows: list[tuple[int, int]],
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 20,
    block: int = 4,
    dtype: torch.dtype = F32,
    kv_dtype: torch.dtype | None = None,
    window: int | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(7)
    new = [count for count, _ in rows]
    widest = max(-(-context // block) for _, context in rows)
    tables = torch.full((len(rows), widest), -1, dtype=torch.int32)
    ids = torch.randperm(sum(-(-context // block) for _, context in rows) + 2, generator=generator).tolist()
    num_blocks = len(ids)
    keys = torch.full((num_blocks, block, kv_heads, head_dim), float("nan"))
    values = keys.clone()
    for sequence, (count, context) in enumerate(rows):
        used = -(-context // block)
        tables[sequence, :used] = torch.tensor([ids.pop() for _ in range(used)], dtype=torch.int32)
        for position in range(context):
            place = int(tables[sequence, position // block]), position % block
            keys[place] = torch.randn(kv_heads, head_dim, generator=generator)
            values[place] = torch.randn(kv_heads, head_dim, generator=generator)
        if window is not None:
            tables[sequence, : max(0, context - count - window + 1) // block] = -1
    scales: list[Any] = [None, None]
    if kv_dtype == torch.int8:
        held = [x.nan_to_num() for x in (keys, values)]
        scales = [(x.abs().amax(-1) / 127 + 1e-9).to(device) for x in held]
        keys, values = ((x / scale.cpu()[..., None]).round().to(torch.int8) for x, scale in zip(held, scales))
    starts = torch.tensor([0, *new]).cumsum(0).to(torch.int32)
    return Case(
        q=normal(sum(new), heads, head_dim, seed=3, dtype=dtype, device=device),
        cache=CacheLayer(
            keys=keys.to(device=device, dtype=kv_dtype or dtype),
            values=values.to(device=device, dtype=kv_dtype or dtype),
            key_scales=scales[0],
            value_scales=scales[1],
        ),
        rows=PagedRows(
            row_starts=starts.to(device),
            context_lens_S=torch.tensor([context for _, context in rows], dtype=torch.int32, device=device),
            tables_SN=tables.to(device),
        ),
        new=new,
    )


def check(case: Case, rule: ScoreRule, *, tile_rows: int = 16, keys: int = 16, splits: int = 1) -> None:
    out = torch.full_like(case.q, 77.0)
    sequences, tokens = case.tiles(tile_rows // (case.q.shape[1] // case.cache.keys.shape[2]))
    paged_attention(
        case.q,
        case.cache,
        case.rows,
        rule,
        tile_sequences_G=sequences,
        tile_tokens_G=tokens,
        tiles=AttentionTiles(rows=tile_rows, keys=keys, stages=1, warps=4),
        splits=splits,
        out_THE=out,
    )
    rows, cache = case.rows, case.cache
    expected = twins.paged_attention(
        case.q,
        cache.keys,
        cache.values,
        key_scales=cache.key_scales,
        value_scales=cache.value_scales,
        row_starts=rows.row_starts,
        context_lens_S=rows.context_lens_S,
        tables_SN=rows.tables_SN,
        scale=rule.scale,
        window=rule.window,
        softcap=rule.softcap,
        slopes_H=rule.slopes_H,
        alibi_scale=rule.alibi_scale,
        alibi_bfloat16=rule.alibi_bfloat16,
    )
    assert_near(out, expected, dtype=case.q.dtype)


MIXED = [(1, 1), (1, 37), (7, 7), (5, 30), (1, 16)]
RULES = {
    "plain": {},
    "window": {"window": 6},
    "softcap": {"softcap": 1.5},
    "alibi": {"slopes_H": [0.5, 0.25, 0.125, 0.0625], "alibi_scale": 0.7},
    "alibi-bfloat16": {"slopes_H": [0.5, 0.25, 0.125, 0.0625], "alibi_bfloat16": True},
}


def rule_of(name: str, device: torch.device) -> ScoreRule:
    options: dict[str, Any] = dict(RULES[name])
    if "slopes_H" in options:
        options["slopes_H"] = torch.tensor(options["slopes_H"], device=device)
    return ScoreRule(scale=0.3, **options)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("name", RULES)
def test_mixed_rows_equal_the_twin(device: torch.device, name: str, splits: int) -> None:
    rule = rule_of(name, device)
    check(make_case(device, rows=MIXED, window=rule.window), rule, splits=splits)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 7), (6, 2, 64), (5, 5, 16), (16, 1, 8)])
def test_any_number_of_heads_and_features(device: torch.device, heads: int, kv_heads: int, head_dim: int) -> None:
    case = make_case(device, rows=[(1, 21), (9, 12)], heads=heads, kv_heads=kv_heads, head_dim=head_dim, block=16)
    check(case, ScoreRule(scale=0.2), tile_rows=32)


@pytest.mark.parametrize("dtype", MATRIX_DTYPES)
@pytest.mark.parametrize("quantized", [False, True])
def test_dtypes_of_model_and_cache(device: torch.device, dtype: torch.dtype, quantized: bool) -> None:
    case = make_case(device, rows=[(1, 40), (3, 5)], dtype=dtype, kv_dtype=torch.int8 if quantized else None)
    check(case, ScoreRule(scale=0.3), splits=2)


def test_padding_rows_become_zero(device: torch.device) -> None:
    case = make_case(device, rows=[(1, 9), (1, 1)])
    case.rows.context_lens_S[1] = 0
    for splits in (1, 2):
        check(case, ScoreRule(scale=0.3), splits=splits)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_query_that_is_no_number_gives_none_and_leaves_others_alone(device: torch.device) -> None:
    for name in ("plain", "softcap"):
        case = make_case(device, rows=[(1, 9), (1, 20)])
        case.q[1] = float("nan")
        check(case, rule_of(name, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize(("rotary", "interleaved"), [(0, False), (20, False), (8, False), (8, True)])
def test_writer_rotates_and_fills_the_places(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype | None, rotary: int, interleaved: bool
) -> None:
    heads, kv_heads, head_dim = 3, 1, 20
    qkv = normal(4, heads + 2 * kv_heads, head_dim, seed=1, dtype=dtype, device=device)
    angles = normal(4, rotary // 2, seed=2, dtype=F32, device=device)
    cos, sin = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotary else (None, None)
    shape = (3, 4, kv_heads, head_dim)
    keys, values = (torch.zeros(shape, dtype=kv_dtype or dtype, device=device) for _ in range(2))
    scales = [torch.zeros(shape[:3], device=device) if kv_dtype == torch.int8 else None for _ in range(2)]
    cache = CacheLayer(keys=keys, values=values, key_scales=scales[0], value_scales=scales[1])
    places = torch.tensor([11, 0, -1, 5], dtype=torch.int32, device=device)
    q = rope_and_write(qkv, cache, places, num_heads=heads, cos_TF=cos, sin_TF=sin, interleaved=interleaved)
    turned = qkv[:, : heads + kv_heads]
    if cos is not None and sin is not None:
        turned = twins.rotate(turned, cos, sin, interleaved=interleaved)
    assert_near(q, turned[:, :heads], dtype=dtype)
    for store, scale, x in ((keys, scales[0], turned[:, heads:]), (values, scales[1], qkv[:, heads + kv_heads :])):
        held = store.flatten(0, 1).float()
        if scale is not None:
            held = held * scale.flatten(0, 1)[..., None]
            allowed = scale.max().item() * 0.51 + 0.02
            torch.testing.assert_close(held[[11, 0, 5]], x[[0, 1, 3]].float(), atol=allowed, rtol=0)
        else:
            assert_near(held[[11, 0, 5]], x[[0, 1, 3]], dtype=dtype)
        assert int((held.abs().sum((1, 2)) > 0).sum()) == 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_int8_cache_keeps_what_is_no_number(device: torch.device) -> None:
    qkv = torch.zeros((1, 3, 8), device=device)
    qkv[0, 2, 3] = float("nan")
    keys, values = (torch.zeros((1, 1, 1, 8), dtype=torch.int8, device=device) for _ in range(2))
    scales = [torch.ones((1, 1, 1), device=device) for _ in range(2)]
    cache = CacheLayer(keys=keys, values=values, key_scales=scales[0], value_scales=scales[1])
    places = torch.zeros(1, dtype=torch.int32, device=device)
    rope_and_write(qkv, cache, places, num_heads=1, cos_TF=None, sin_TF=None, interleaved=False)
    assert (scales[0].item(), scales[1].isnan().item()) == (0.0, True)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (12, 0)])
@pytest.mark.parametrize("head_dim", [20, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_the_shared_memory(capability: tuple[int, int], head_dim: int, itemsize: int) -> None:
    shared = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (9, 0): 227, (12, 0): 99}[capability] * 1024
    for rows in (16, 64, 128):
        tiles = attention_tiles(head_dim, itemsize, capability, rows=rows)
        assert 16 <= tiles.rows <= rows
        width = 1 << (head_dim - 1).bit_length()
        assert (tiles.rows + 2 * tiles.stages * tiles.keys) * width * itemsize <= shared
        assert capability[0] >= 8 or tiles.stages == 1


def test_cards_that_triton_leaves_out() -> None:
    assert "below 7.0" in str(against_capability((6, 0), torch.float16))
    assert "no bfloat16" in str(against_capability((7, 5), torch.bfloat16))
    assert against_capability((7, 5), torch.float16) is None
    assert against_capability((9, 0), torch.bfloat16) is None


def test_splits_follow_work_and_card() -> None:
    assert splits_for(32, 8, longest=256, processors=132, keys=64) == 1
    assert splits_for(1, 8, longest=32768, processors=132, keys=64) == 16
    assert splits_for(1, 8, longest=512, processors=132, keys=64) == 2
    assert splits_for(0, 8, longest=512, processors=132, keys=64) == 2
