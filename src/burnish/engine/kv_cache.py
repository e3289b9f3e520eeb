"""Keys and values of every running sequence, in slots allocated ahead, and the attention that reads them in place.

Slots 0..n-1 are in use (the scheduler sees to it), so a step reads contiguous views: nothing is gathered or copied
but the new tokens' own keys and values. The tensors grow in steps, as long contexts cost memory only once somebody
needs them.

Shapes: N slots, B sequences of a step, H query heads, K kv heads, G = H / K, T query tokens, C capacity in tokens,
S key tokens read, E head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.models.attention import AttentionSpec, FullCausal, grouped_attention, softcapped_attention, visible
from burnish.models.config import ModelConfig

LENGTH_STEP = 64


class KVCache:
    """The store: per layer one tensor of keys and one of values, (N, K, C, E) each.

    Args:
        max_num_seqs, max_length: what N and C may grow to.
    """

    def __init__(
        self, config: ModelConfig, *, max_num_seqs: int, max_length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_length = max_length
        self.num_slots = 0
        self.capacity = 0
        shape = (0, config.num_kv_heads, 0, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    @property
    def num_bytes(self) -> int:
        """Bytes allocated now."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def reserve(self, num_slots: int, length: int) -> None:
        """Make room for `num_slots` sequences of `length` tokens; what is stored stays.

        One layer's tensor at a time is copied, so growing costs little memory beside the new size.
        """
        if num_slots <= self.num_slots and length <= self.capacity:
            return
        assert num_slots <= self.max_num_seqs
        if num_slots > self.num_slots:
            num_slots = min(self.max_num_seqs, 1 << (num_slots - 1).bit_length())
        if length > self.capacity:
            grown = max(length, self.capacity * 3 // 2)
            length = min(max(self.max_length, length), -(-grown // LENGTH_STEP) * LENGTH_STEP)
        num_slots, length = max(num_slots, self.num_slots), max(length, self.capacity)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                # Zeros, not empty: a masked key's weight is 0, and 0 times leftover NaN would be NaN.
                new = old.new_zeros((num_slots, old.shape[1], length, old.shape[3]))
                new[: self.num_slots, :, : self.capacity] = old
                tensors[layer] = new
        self.num_slots, self.capacity = num_slots, length

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]


class CachedAttention:
    """One step's `Attention`: stores the step's keys and values in their slots and attends to all that came before.

    Every sequence of the step has the same number of new tokens (padded on the right). Several new tokens are
    allowed for sequences that all start at 0, and for a single sequence that starts anywhere; otherwise there is one.

    Args:
        first_slot: the step's sequences are in slots first_slot .. first_slot + B - 1.
        starts: tokens each sequence has in the cache before the step.
        num_new: new tokens per sequence, padding included.
    """

    def __init__(self, cache: KVCache, *, first_slot: int, starts: list[int], num_new: int) -> None:
        device = cache.keys[0].device
        self._cache = cache
        self._slots = slice(first_slot, first_slot + len(starts))
        self._num_new = num_new
        self._low, self._high = min(starts), max(starts)
        self._even = self._low == self._high
        assert num_new == 1 or (self._even and (self._high == 0 or len(starts) == 1))
        self._starts_B = torch.tensor(starts, device=device)
        self._rows_B = torch.arange(first_slot, first_slot + len(starts), device=device)
        self._fresh = FullCausal() if self._high == 0 else None
        self._masks: dict[tuple[object, ...], Tensor | None] = {}

    def attend(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
        """Store k and v, and return attention over everything stored; see `Attention.attend`."""
        keys_NKCE, values_NKCE = self._cache.keys[layer], self._cache.values[layer]
        end = self._high + self._num_new
        if self._even:
            keys_NKCE[self._slots, :, self._high : end] = k_BKTE
            values_NKCE[self._slots, :, self._high : end] = v_BKTE
        else:
            keys_NKCE[self._rows_B, :, self._starts_B] = k_BKTE[:, :, 0]
            values_NKCE[self._rows_B, :, self._starts_B] = v_BKTE[:, :, 0]
        if self._fresh is not None:
            return self._fresh.attend(layer, q_BHTE, k_BKTE, v_BKTE, spec)
        begin = 0 if spec.window is None else max(0, self._low - spec.window + 1)
        k_BKSE = keys_NKCE[self._slots, :, begin:end]
        v_BKSE = values_NKCE[self._slots, :, begin:end]
        mask = self._mask(begin, end, spec, q_BHTE.dtype)
        if spec.softcap is not None:
            if mask is None:
                mask = torch.ones((), dtype=torch.bool, device=q_BHTE.device)
            return softcapped_attention(q_BHTE, k_BKSE, v_BKSE, mask, scale=spec.scale, softcap=spec.softcap)
        if self._num_new > 1:
            return grouped_attention(q_BHTE, k_BKSE, v_BKSE, scale=spec.scale, mask=mask)
        # The G queries that share a kv head become G query tokens, so that each key is read once and nothing is
        # repeated.
        num_kv_heads = k_BKSE.shape[1]
        q_BKGE = q_BHTE.reshape(q_BHTE.shape[0], num_kv_heads, -1, q_BHTE.shape[-1])
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], num_kv_heads, -1, mask.shape[-1])
        out_BKGE = F.scaled_dot_product_attention(q_BKGE, k_BKSE, v_BKSE, attn_mask=mask, scale=spec.scale)
        return out_BKGE.reshape(q_BHTE.shape)

    def _mask(self, begin: int, end: int, spec: AttentionSpec, dtype: torch.dtype) -> Tensor | None:
        """Additive, (B, 1 or H, T, S) in `dtype`; None where every query sees every key. Layers of one kind share
        it.
        """
        alibi = spec.alibi_slopes_H is not None
        key = (begin, spec.window, alibi, dtype)
        if key not in self._masks:
            windowed = spec.window is not None and end - begin > spec.window
            if self._num_new == 1 and self._even and not alibi and not windowed:
                self._masks[key] = None
            else:
                queries_BT = self._starts_B[:, None] + torch.arange(self._num_new, device=self._starts_B.device)
                keys_S = torch.arange(begin, end, device=self._starts_B.device)
                seen = visible(queries_BT, keys_S, spec.window)[:, None]
                bias = spec.alibi_bias(queries_BT, keys_S) if alibi else torch.zeros((), device=seen.device)
                self._masks[key] = torch.where(seen, bias, -math.inf).to(dtype)
        return self._masks[key]
