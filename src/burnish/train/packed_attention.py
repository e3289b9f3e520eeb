"""Causal attention over packed rows with torch's own operators: any family, any device, differentiable.

Rows of like length are laid side by side and attended to as a padded batch, which keeps the number of calls small and
the padding below the factor between two buckets. `compiled_attention.py` has the compiled way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby, pairwise

import torch
from torch import Tensor

from burnish.models.attention import AttentionSpec
from burnish.train.short_attention import ShortCausal

# N positions of all rows, R rows of one bucket, H query heads, K kv heads, T tokens of the longest row, E head dim

SMALLEST_BUCKET = 32


class PackedCausal:
    """An `Attention` for one packed micro-batch, see `models/attention.py`.

    Args:
        starts: R + 1 numbers, first position of each row and the end of the last.
        device: where the batch lives.
    """

    def __init__(self, starts: Sequence[int], *, device: torch.device) -> None:
        self.starts = tuple(starts)
        self.device = device
        self._dense = ShortCausal()

    @cached_property
    def _buckets(self) -> list[_Bucket]:
        return [_Bucket(rows, device=self.device) for rows in _like_lengths(self.starts)]

    def attend(self, layer: int, q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, spec: AttentionSpec) -> Tensor:
        """Attend within each row; B is 1. See `Attention.attend`."""
        q_NHE, k_NKE, v_NKE = (x[0].transpose(0, 1) for x in (q_BHTE, k_BKTE, v_BKTE))
        parts = [
            bucket.rows_of(
                self._dense.attend(layer, bucket.padded(q_NHE), bucket.padded(k_NKE), bucket.padded(v_NKE), spec)
            )
            for bucket in self._buckets
        ]
        if len(parts) == 1 and self._buckets[0].in_order:
            out_NHE = parts[0]
        else:
            order = torch.cat([bucket.places for bucket in self._buckets])
            out_NHE = torch.empty_like(q_NHE).index_copy(0, order, torch.cat(parts))
        return out_NHE.transpose(0, 1)[None]


class _Bucket:
    """Rows of like length and where their positions stand in the packed batch."""

    def __init__(self, rows: list[tuple[int, int]], *, device: torch.device) -> None:
        self.num_rows, self.width = len(rows), max(end - begin for begin, end in rows)
        places: list[int] = []
        slots: list[int] = []
        for number, (begin, end) in enumerate(rows):
            places.extend(range(begin, end))
            slots.extend(range(number * self.width, number * self.width + end - begin))
        self.in_order = places == list(range(len(places)))
        self.places = torch.tensor(places, device=device)
        # Filling repeats the row's last position: causal attention of the real ones never looks there.
        source = [min(begin + t, end - 1) for begin, end in rows for t in range(self.width)]
        self.source = torch.tensor(source, device=device)
        self.slots = torch.tensor(slots, device=device)

    def padded(self, x_NHE: Tensor) -> Tensor:
        """(N, H, E) -> (R, H, T, E)."""
        return x_NHE.index_select(0, self.source).unflatten(0, (self.num_rows, self.width)).transpose(1, 2)

    def rows_of(self, x_RHTE: Tensor) -> Tensor:
        """The real positions of (R, H, T, E), in the order of `places`."""
        return x_RHTE.transpose(1, 2).flatten(0, 1).index_select(0, self.slots)


def _like_lengths(starts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Rows by the power of two that bounds their length."""
    rows = list(pairwise(starts))

    def bound(row: tuple[int, int]) -> int:
        return max(SMALLEST_BUCKET, 1 << (row[1] - row[0] - 1).bit_length())

    return [list(group) for _, group in groupby(sorted(rows, key=bound), key=bound)]
