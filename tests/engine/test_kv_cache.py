"""The cache keeps what it was given while it grows and slots move, and attends to it as a full forward would."""

from __future__ import annotations

import pytest
import torch

from burnish.engine.kv_cache import CachedAttention, KVCache
from burnish.models.attention import AttentionSpec, FullCausal, alibi_slopes
from burnish.models.decoder import Decoder

B, H, K, T, E = 3, 4, 2, 13, 8

SPECS = {
    "plain": {},
    "window": {"window": 5},
    "alibi": {"alibi_slopes_H": torch.tensor(alibi_slopes(H))},
    "softcap": {"softcap": 2.0},
    "window-softcap": {"window": 4, "softcap": 2.0},
}


def make_cache(decoder: Decoder, *, max_num_seqs: int = 4, max_length: int = 200) -> KVCache:
    return KVCache(
        decoder.config,
        max_num_seqs=max_num_seqs,
        max_length=max_length,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q_BHTE = torch.randn(B, H, T, E, generator=generator)
    return q_BHTE, *(torch.randn(B, K, T, E, generator=generator) for _ in range(2))


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("lengths", [(7, 7, 7), (3, 9, 5)])
def test_decode_equals_full_attention(decoder: Decoder, name: str, lengths: tuple[int, ...]) -> None:
    spec = AttentionSpec(num_heads=H, num_kv_heads=K, head_dim=E, scale=0.3, **SPECS[name])
    q, k, v = inputs()
    full = FullCausal().attend(0, q, k, v, spec)
    cache = make_cache(decoder)
    cache.reserve(4, 20)
    for row, length in enumerate(lengths):
        prefill = CachedAttention(cache, first_slot=1 + row, starts=[0], num_new=length)
        out = prefill.attend(1, *(x[row : row + 1, :, :length] for x in (q, k, v)), spec)
        torch.testing.assert_close(out, full[row : row + 1, :, :length])
    for step in range(3):
        starts = [length + step for length in lengths]
        rows, places = range(B), starts
        decode = CachedAttention(cache, first_slot=1, starts=starts, num_new=1)
        out = decode.attend(1, *(x[rows, :, places][:, :, None] for x in (q, k, v)), spec)
        torch.testing.assert_close(out[:, :, 0], full[rows, :, places])


@pytest.mark.parametrize("name", sorted(SPECS))
def test_pieces_of_a_prompt_equal_full_attention(decoder: Decoder, name: str) -> None:
    spec = AttentionSpec(num_heads=H, num_kv_heads=K, head_dim=E, scale=0.3, **SPECS[name])
    q, k, v = (x[:1] for x in inputs())
    full = FullCausal().attend(0, q, k, v, spec)
    cache = make_cache(decoder)
    cache.reserve(1, T)
    for begin, end in ((0, 4), (4, 9), (9, 10), (10, 13)):
        piece = CachedAttention(cache, first_slot=0, starts=[begin], num_new=end - begin)
        out = piece.attend(0, q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end], spec)
        torch.testing.assert_close(out, full[:, :, begin:end])


def test_growing_keeps_what_is_stored(decoder: Decoder) -> None:
    cache = make_cache(decoder)
    assert cache.num_bytes == 0
    cache.reserve(1, 10)
    first = cache.num_bytes
    cache.keys[1][0, :, :10] = 7.0
    cache.reserve(3, 100)
    assert cache.num_bytes > first
    assert (cache.keys[1][0, :, :10] == 7.0).all()
    assert (cache.keys[1][1:] == 0.0).all()
    assert (cache.num_slots, cache.capacity) == (4, 128)


def test_growing_is_bounded_by_what_may_come(decoder: Decoder) -> None:
    cache = make_cache(decoder, max_num_seqs=3, max_length=100)
    cache.reserve(3, 90)
    assert (cache.num_slots, cache.capacity) == (3, 100)


def test_moving_copies_only_the_length(decoder: Decoder) -> None:
    cache = make_cache(decoder)
    cache.reserve(2, 8)
    cache.values[0][1] = 3.0
    cache.move(1, 0, 5)
    assert (cache.values[0][0, :, :5] == 3.0).all()
    assert (cache.values[0][0, :, 5:] == 0.0).all()
