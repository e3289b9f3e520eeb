"""Keys and values of all sequences in blocks of one store, and the attention of a step's packed rows over them.

New keys and values go to their places first. Then rows are computed in groups of as many new tokens each and of similar
length: what a group's sequences hold is gathered block by block, padded to the longest, and attended to in one call.
Rows that begin at their sequence's first token need nothing gathered.

Shapes: T packed tokens, S sequences, G sequences of a group, N blocks per sequence, P tokens per block, C places
gathered (N P), Q new tokens per sequence, H query heads, K kv heads, R = H / K, E head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.engine.step import StepInputs
from burnish.models.attention import AttentionSpec, FullCausal, grouped_attention, softcapped_attention, visible
from burnish.models.config import ModelConfig

# Sequences are gathered together while padding stays below this share of what is gathered, or below so many tokens.
_MAX_PADDING = 0.3
_FEW_TOKENS = 1024
# Most (G, Q, C) scores of one head in one call: attention with masks may materialise them.
_MAX_SCORES = 1 << 20

_CACHE_LINE = 64


class KVStore:
    """The memory: per layer one tensor of keys and one of values, (num_blocks, P, K, E) each.

    Args:
        config: of the layers that are kept.
        dtype: bfloat16, float16 or float32; or int8, which keeps one float32 scale per token and head.
        first_layer: number of the first of them.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        first_layer: int = 0,
    ) -> None:
        self.dtype = dtype
        self._first = first_layer
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        layers = range(config.num_layers)
        self.keys = [untouched_zeros(shape, dtype, device) for _ in layers]
        self.values = [untouched_zeros(shape, dtype, device) for _ in layers]
        scales = layers if dtype == torch.int8 else ()
        self.key_scales = [untouched_zeros(shape[:3], torch.float32, device) for _ in scales]
        self.value_scales = [untouched_zeros(shape[:3], torch.float32, device) for _ in scales]

    @property
    def num_bytes(self) -> int:
        """Bytes allocated, whether touched yet or not."""
        tensors = (*self.keys, *self.values, *self.key_scales, *self.value_scales)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def write(self, layer: int, places_T: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> None:
        """Store tokens at flat places (block * P + place)."""
        layer -= self._first
        pairs = ((self.keys, self.key_scales, k_TKE), (self.values, self.value_scales, v_TKE))
        for stores, scales, x_TKE in pairs:
            flat = stores[layer].flatten(0, 1)
            if self.dtype == torch.int8:
                x_TKE, scale_TK = quantize_tokens(x_TKE)
                scales[layer].flatten(0, 1)[places_T] = scale_TK
            flat[places_T] = x_TKE.to(self.dtype)

    def read(self, layer: int, blocks_GN: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of these blocks, (G, K, C, E) each."""
        layer -= self._first
        return (
            self._gather(self.keys[layer], self.key_scales, layer, blocks_GN, dtype),
            self._gather(self.values[layer], self.value_scales, layer, blocks_GN, dtype),
        )

    def _gather(self, store: Tensor, scales: list[Tensor], layer: int, blocks_GN: Tensor, dtype: torch.dtype) -> Tensor:
        flat = blocks_GN.flatten()
        x_GCKE = store.index_select(0, flat).unflatten(0, blocks_GN.shape).flatten(1, 2)
        if self.dtype == torch.int8:
            scale_GCK = scales[layer].index_select(0, flat).unflatten(0, blocks_GN.shape).flatten(1, 2)
            x_GCKE = x_GCKE.float().mul_(scale_GCK[..., None])
        return x_GCKE.to(dtype).transpose(1, 2)


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory, on a CPU, the system only provides once it is written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the system for zeroed pages; torch writes the zeros itself. Vectors should not straddle cache lines.
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(num_bytes + _CACHE_LINE, dtype=np.uint8))
    begin = -memory.data_ptr() % _CACHE_LINE
    return memory[begin : begin + num_bytes].view(dtype).view(shape)


def quantize_tokens(x_TKE: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and float32 (T, K) scales, such that value * scale is x to within half a scale."""
    scale_TK = x_TKE.abs().amax(dim=-1).float() / 127.0
    rounded = (x_TKE.float() / scale_TK.clamp_min(1e-30)[..., None]).round_().clamp_(-127, 127)
    return rounded.to(torch.int8), scale_TK


@dataclass(kw_only=True)
class _Group:
    """Sequences computed in one call.

    Attributes:
        tokens: their G * Q tokens among the packed ones, one sequence after the other: a slice where it is one.
        first_block: of the first sequence's gathered blocks; all sequences' positions are their own.
        blocks_GN: None where every sequence begins in this step.
    """

    size: int
    num_new: int
    tokens: slice | Tensor
    queries_GQ: Tensor
    blocks: dict[int | None, tuple[Tensor, Tensor, Tensor]]
    fresh: bool


class PagedAttention:
    """One step's `Attention` over packed rows (B = 1).

    Args:
        store: None where every row begins at its first token and nothing is kept.
        windows: of the decoder's layers.
    """

    def __init__(self, step: StepInputs, store: KVStore | None, *, windows: set[int | None], device: torch.device):
        self._store = store
        self._device = device
        self._masks: dict[tuple[object, ...], Tensor] = {}
        self._fresh = FullCausal()
        counts_S = np.diff(step.row_starts)
        if store is not None:
            rows_T = np.repeat(np.arange(len(counts_S)), counts_S)
            blocks_T = step.block_tables_SN[rows_T, step.positions_T // store.block_size]
            places_T = blocks_T.astype(np.int64) * store.block_size + step.positions_T % store.block_size
            self._places_T = torch.from_numpy(places_T).to(device)
        self._groups = [self._group(step, members, windows) for members in _grouped(step, counts_S, store)]

    def attend(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
        """Store k and v, and return attention over all that each token's sequence holds; see `Attention.attend`."""
        q_THE, k_TKE, v_TKE = (x[0].transpose(0, 1) for x in (q_BHTE, k_BKTE, v_BKTE))
        if self._store is not None:
            self._store.write(layer, self._places_T, k_TKE, v_TKE)
        out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
        for number, group in enumerate(self._groups):
            shape = (group.size, group.num_new)
            q_GHQE = q_THE[group.tokens].unflatten(0, shape).transpose(1, 2)
            if group.fresh:
                k_GKQE = k_TKE[group.tokens].unflatten(0, shape).transpose(1, 2)
                v_GKQE = v_TKE[group.tokens].unflatten(0, shape).transpose(1, 2)
                out_GHQE = self._fresh.attend(layer, q_GHQE, k_GKQE, v_GKQE, spec)
            else:
                out_GHQE = self._gathered(layer, number, group, q_GHQE, spec)
            out_THE[group.tokens] = out_GHQE.transpose(1, 2).flatten(0, 1)
        return out_THE.transpose(0, 1)[None]

    def _gathered(self, layer: int, number: int, group: _Group, q_GHQE: Tensor, spec: AttentionSpec) -> Tensor:
        assert self._store is not None
        blocks_GN, _, _ = group.blocks[spec.window]
        k_GKCE, v_GKCE = self._store.read(layer, blocks_GN, q_GHQE.dtype)
        mask = self._mask(number, group, spec, q_GHQE.dtype)
        if spec.softcap is not None:
            return softcapped_attention(q_GHQE, k_GKCE, v_GKCE, mask, scale=spec.scale, softcap=spec.softcap)
        if group.num_new > 1:
            return grouped_attention(q_GHQE, k_GKCE, v_GKCE, scale=spec.scale, mask=mask)
        # The R queries that share a kv head become R query tokens: each key is read once and nothing is repeated.
        num_kv_heads = k_GKCE.shape[1]
        q_GKRE = q_GHQE.reshape(q_GHQE.shape[0], num_kv_heads, -1, q_GHQE.shape[-1])
        if mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], num_kv_heads, -1, mask.shape[-1])
        out_GKRE = F.scaled_dot_product_attention(q_GKRE, k_GKCE, v_GKCE, attn_mask=mask, scale=spec.scale)
        return out_GKRE.reshape(q_GHQE.shape)

    def _mask(self, number: int, group: _Group, spec: AttentionSpec, dtype: torch.dtype) -> Tensor:
        """Additive, (G, 1 or H, Q, C) in `dtype`; layers of one kind share it."""
        alibi = spec.alibi_slopes_H is not None
        key = (number, spec.window, alibi, dtype)
        mask = self._masks.get(key)
        if mask is None:
            _, positions_GC, held_GC = group.blocks[spec.window]
            seen = (visible(group.queries_GQ, positions_GC, spec.window) & held_GC[:, None])[:, None]
            bias = spec.alibi_bias(group.queries_GQ, positions_GC) if alibi else torch.zeros((), device=seen.device)
            mask = self._masks[key] = torch.where(seen, bias, -math.inf).to(dtype)
        return mask

    def _group(self, step: StepInputs, members: list[int], windows: set[int | None]) -> _Group:
        first, num_new = members[0], int(step.row_starts[members[0] + 1] - step.row_starts[members[0]])
        starts_G = step.row_starts[members]
        indices = (starts_G[:, None] + np.arange(num_new)).reshape(-1)
        begin = int(step.row_starts[first])
        consecutive = members == list(range(first, first + len(members)))
        tokens = slice(begin, begin + len(indices)) if consecutive else torch.from_numpy(indices).to(self._device)
        ends_G = step.context_lens_S[members]
        group = _Group(
            size=len(members),
            num_new=num_new,
            tokens=tokens,
            queries_GQ=torch.from_numpy(step.positions_T[indices].reshape(-1, num_new)).to(self._device),
            blocks={},
            fresh=bool((ends_G == num_new).all()),
        )
        if not group.fresh:
            assert self._store is not None
            for window in windows:
                group.blocks[window] = self._blocks(step.block_tables_SN[members], ends_G, num_new, window)
        return group

    def _blocks(
        self, tables_GN: np.ndarray, ends_G: np.ndarray, num_new: int, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Block ids to gather (G, N), the positions they hold (G, C) and whether there is anything there (G, C)."""
        assert self._store is not None
        size = self._store.block_size
        firsts_G = np.zeros_like(ends_G) if window is None else np.maximum(0, ends_G - num_new - window + 1) // size
        width = int((-(-ends_G // size) - firsts_G).max())
        places_GN = firsts_G[:, None] + np.arange(width)
        inside_GN = places_GN < tables_GN.shape[1]
        blocks_GN = np.where(
            inside_GN, np.take_along_axis(tables_GN, np.minimum(places_GN, tables_GN.shape[1] - 1), 1), -1
        )
        positions_GC = (places_GN[:, :, None] * size + np.arange(size)).reshape(len(ends_G), -1)
        # Padding reads a block of the same sequence again, hidden by the mask: another's might hold what is no number.
        read_GN = np.where(blocks_GN >= 0, blocks_GN, blocks_GN.max(axis=1, keepdims=True))
        tensors = (read_GN.astype(np.int64), positions_GC, np.repeat(blocks_GN >= 0, size, axis=1))
        blocks, positions, held = (torch.from_numpy(array).to(self._device) for array in tensors)
        return blocks, positions, held


def _grouped(step: StepInputs, counts_S: np.ndarray, store: KVStore | None) -> list[list[int]]:
    """Sequences to compute together: equally many new tokens, all or none from their first token, similar length."""
    kinds: dict[tuple[int, bool], list[int]] = {}
    for index, (count, length) in enumerate(zip(counts_S.tolist(), step.context_lens_S.tolist())):
        kinds.setdefault((count, count == length), []).append(index)
    groups: list[list[int]] = []
    for (count, fresh), members in kinds.items():
        if store is None:
            assert fresh
        if fresh or len(members) == 1:
            groups.append(members)
            continue
        members = sorted(members, key=lambda index: int(step.context_lens_S[index]))
        lengths = [int(step.context_lens_S[index]) for index in members]
        begin = total = 0
        for place, length in enumerate(lengths):
            padded = length * (place + 1 - begin)
            wasteful = padded - total - length > max(_MAX_PADDING * padded, _FEW_TOKENS)
            if place > begin and (wasteful or padded * count > _MAX_SCORES):
                groups.append(sorted(members[begin:place]))
                begin, total = place, 0
            total += length
        groups.append(sorted(members[begin:]))
    return groups
