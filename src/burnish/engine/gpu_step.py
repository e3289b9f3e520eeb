"""One step's rows on the GPU: packed indices, tiles for the attention kernel, and the attention over them.

Shapes: T packed tokens, S sequences, N blocks of the longest table, G tiles, H query heads, K kv heads, E head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from burnish.engine.paged_attention import KVStore
from burnish.engine.step import StepInputs
from burnish.kernels.gpu.attention import CacheLayer, PagedRows, ScoreRule, paged_attention
from burnish.kernels.gpu.rope_write import rope_and_write
from burnish.kernels.gpu.support import AttentionTiles
from burnish.models.attention import AttentionSpec
from burnish.models.rope import RopeTable


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles of one size.

    Attributes:
        sequences_G, tokens_G: int32 sequence and first packed token of each.
        shape: rows, and keys at once.
        splits: programs that share a tile's keys.
    """

    sequences_G: Tensor
    tokens_G: Tensor
    shape: AttentionTiles
    splits: int


@dataclass(frozen=True, kw_only=True)
class DeviceStep:
    """A step on the device; all int32.

    Attributes:
        places_T: where each token's keys and values go (block * block size + place); -1 for padding.
        lengths_T: see `Rope.table`; None where no rotation looks at them.
        logit_rows_L: None for every token.
    """

    tokens_T: Tensor
    positions_T: Tensor
    places_T: Tensor
    lengths_T: Tensor | None
    rows: PagedRows
    tiles: tuple[Tiles, ...]
    logit_rows_L: Tensor | None


class GpuAttention:
    """One step's `PackedQueries`.

    Args:
        rules: of each layer, on the device.
    """

    def __init__(self, step: DeviceStep, cache: list[CacheLayer], rules: list[ScoreRule]) -> None:
        self._step, self._cache, self._rules = step, cache, rules

    def attend(self, layer: int, qkv_TXE: Tensor, rope: RopeTable | None, spec: AttentionSpec) -> Tensor:
        """Rotate, keep keys and values, and return attention over all that each token's sequence holds: (T, H, E).

        Args:
            qkv_TXE: (T, H + 2 K, E), contiguous, not rotated.
        """
        step, cache = self._step, self._cache[layer]
        q_THE = rope_and_write(
            qkv_TXE,
            cache,
            step.places_T,
            num_heads=spec.num_heads,
            cos_TF=None if rope is None else rope.cos.flatten(0, 2),
            sin_TF=None if rope is None else rope.sin.flatten(0, 2),
            interleaved=rope is not None and rope.interleaved,
        )
        out_THE = torch.empty_like(q_THE)
        for tiles in step.tiles:
            paged_attention(
                q_THE,
                cache,
                step.rows,
                self._rules[layer],
                tile_sequences_G=tiles.sequences_G,
                tile_tokens_G=tiles.tokens_G,
                tiles=tiles.shape,
                splits=tiles.splits,
                out_THE=out_THE,
            )
        return out_THE


def cache_layers(store: KVStore) -> list[CacheLayer]:
    """The store's tensors, layer by layer."""
    quantized = store.dtype == torch.int8
    return [
        CacheLayer(
            keys=store.keys[layer],
            values=store.values[layer],
            key_scales=store.key_scales[layer] if quantized else None,
            value_scales=store.value_scales[layer] if quantized else None,
        )
        for layer in range(len(store.keys))
    ]


def score_rule(spec: AttentionSpec, device: torch.device) -> ScoreRule:
    """The spec as the kernel takes it."""
    slopes_H = spec.alibi_slopes_H
    if slopes_H is not None:
        slopes_H = (slopes_H.bfloat16().float() if spec.alibi_bfloat16 else slopes_H.float()).to(device)
    return ScoreRule(
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        slopes_H=slopes_H,
        alibi_scale=spec.alibi_scale,
        alibi_bfloat16=spec.alibi_bfloat16,
    )


def places_of(step: StepInputs, *, block_size: int) -> np.ndarray:
    """Flat places of the step's tokens in the cache, int32 (T,)."""
    rows_T = np.repeat(np.arange(len(step.context_lens_S)), np.diff(step.row_starts))
    blocks_T = step.block_tables_SN[rows_T, step.positions_T // block_size]
    return (blocks_T * block_size + step.positions_T % block_size).astype(np.int32)


def tile_starts(row_starts: np.ndarray, *, few: int, many: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles for rows of up to `few` tokens, one each, and for longer ones, of `many` tokens each.

    Returns:
        Two int32 (2, G): sequence and first token.
    """
    counts_S = np.diff(row_starts)
    short_G = np.flatnonzero(counts_S <= few)
    long_S = np.flatnonzero(counts_S > few)
    tiles_S = -(-counts_S[long_S] // many)
    sequences_G = np.repeat(long_S, tiles_S)
    first_S = np.cumsum(tiles_S) - tiles_S
    tokens_G = row_starts[sequences_G] + (np.arange(len(sequences_G)) - np.repeat(first_S, tiles_S)) * many
    pairs = (np.stack((short_G, row_starts[short_G])), np.stack((sequences_G, tokens_G)))
    return pairs[0].astype(np.int32), pairs[1].astype(np.int32)


def upload(arrays: list[np.ndarray], device: torch.device) -> list[Tensor]:
    """int32 arrays in one copy that the host does not wait for."""
    sizes = [array.size for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays], dtype=np.int32))
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    return [part.view(array.shape) for part, array in zip(flat.split(sizes), arrays)]
