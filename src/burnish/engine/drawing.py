"""Random choice by temperature, top-k, top-p and min-p, all rows at once.

The tokens that a row keeps are described by the smallest weight kept and, where several tokens share that weight, how
many of them are kept (those with the lowest ids). The choice inverts the cumulative distribution in the order of ids.
So neither depends on how a sort breaks ties, and a row's choice never depends on its neighbours.

Shapes: B rows, V vocabulary, C likeliest tokens in falling order, P pieces of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from burnish.engine.sampling import SamplingParams

# Top-p is looked for among this many likeliest tokens before the whole vocabulary is sorted.
_CANDIDATES = 256
_PIECE = 256


def draw(logits_BV: Tensor, params: Sequence[SamplingParams], points: Sequence[float]) -> Tensor:
    """Choose one token per row; int64 (B,).

    Args:
        logits_BV: float32 with a finite maximum in each row; not modified.
        params: of each row, temperature above 0.
        points: a uniform number in [0, 1) for each row.
    """
    weights_BV = tempered_weights(logits_BV, params)
    filter_weights(weights_BV, params)
    return invert(weights_BV, torch.tensor(points, dtype=torch.float64, device=logits_BV.device))


def tempered_weights(logits_BV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """exp(logits / temperature), scaled so that each row's largest is 1; a new tensor."""
    temperature_B = torch.tensor([one.temperature for one in params], device=logits_BV.device)
    # Shifted before it is divided: a tiny temperature must not overflow the likeliest token's logit.
    weights_BV = logits_BV - logits_BV.amax(dim=-1, keepdim=True)
    return weights_BV.div_(temperature_B[:, None]).exp_()


def filter_weights(weights_BV: Tensor, params: Sequence[SamplingParams]) -> None:
    """Set the weights that top-k, top-p (in this order) and min-p drop to 0, in place; each row's largest is 1."""
    ranked = [row for row, one in enumerate(params) if one.top_k or one.top_p < 1.0]
    kept: dict[int, _Kept] = {}
    if ranked:
        part_BV = weights_BV if len(ranked) == len(params) else weights_BV[ranked]
        # One more than is kept, to see whether it weighs the same.
        most = max(1 + (params[row].top_k or _CANDIDATES) for row in ranked)
        top_BC = part_BV.topk(min(most, weights_BV.shape[1])).values
        totals = _piece_sums(part_BV).sum(dim=-1, dtype=torch.float64).tolist()
        for row, top_C, total in zip(ranked, top_BC, totals):
            kept[row] = _kept(weights_BV[row], top_C, total, params[row])
    for row, one in enumerate(params):
        found = kept.get(row)
        floor = max(one.min_p, 0.0 if found is None else found.smallest)
        if floor > 0.0:
            # Keeps what is larger than the bound; row by row, which is several times faster than a mask over all.
            torch.threshold_(weights_BV[row], float(np.nextafter(np.float32(floor), np.float32(0.0))), 0.0)
        if found is not None and found.tied:
            _drop_ties(weights_BV[row], found)


class _Kept(NamedTuple):
    """What top-k and top-p keep of a row: how many tokens, the smallest weight, and whether others may share it."""

    count: int
    smallest: float
    tied: bool


def _kept(weights_V: Tensor, top_C: Tensor, total: float, params: SamplingParams) -> _Kept:
    count = limit = min(params.top_k or len(weights_V), len(weights_V))
    if params.top_p < 1.0:
        sums_C = top_C[:limit].cumsum(0, dtype=torch.float64)
        needed = params.top_p * (float(sums_C[-1]) if params.top_k else total)
        if float(sums_C[-1]) < needed and len(top_C) < limit:
            top_C = _sorted(weights_V)
            sums_C = top_C.cumsum(0, dtype=torch.float64)
        # The first token is kept always; another one while those before it do not reach the share.
        count = min(int(torch.searchsorted(sums_C, needed)) + 1, limit)
    smallest = float(top_C[count - 1])
    return _Kept(count, smallest, tied=count < len(weights_V) and smallest == float(top_C[min(count, len(top_C) - 1)]))


def _sorted(weights_V: Tensor) -> Tensor:
    """Falling order. numpy's sort is many times faster than torch's on the CPU, which also returns indices."""
    if weights_V.device.type == "cpu":
        return torch.from_numpy(np.sort(weights_V.numpy())[::-1].copy())
    return weights_V.sort(descending=True).values


def _drop_ties(weights_V: Tensor, kept: _Kept) -> None:
    """Where more tokens than are kept share the smallest weight, keep those with the lowest ids."""
    surplus = int(torch.count_nonzero(weights_V)) - kept.count
    if surplus > 0:
        weights_V[(weights_V == kept.smallest).nonzero()[-surplus:, 0]] = 0.0


def invert(weights_BV: Tensor, points_B: Tensor) -> Tensor:
    """The first token of each row whose cumulative weight passes `points_B` times the whole; never one of weight 0.

    Summed in two levels, pieces and then tokens of one piece: one pass over the vocabulary, in float32, is enough.
    """
    vocabulary = weights_BV.shape[1]
    sums_BP = _piece_sums(weights_BV)
    piece_B1, rest_B1 = _passed(sums_BP, points_B[:, None] * sums_BP.sum(dim=-1, keepdim=True, dtype=torch.float64))
    places_BP = piece_B1 * _PIECE + torch.arange(_PIECE, device=weights_BV.device)
    inside_BP = weights_BV.gather(1, places_BP.clamp(max=vocabulary - 1))
    inside_BP = torch.where(places_BP < vocabulary, inside_BP, 0.0)
    offset_B1, _ = _passed(inside_BP, rest_B1)
    return (piece_B1 * _PIECE + offset_B1)[:, 0]


def _piece_sums(weights_BV: Tensor) -> Tensor:
    """Sums over pieces of the vocabulary, the last one perhaps shorter; the same for a row whatever the others."""
    whole = weights_BV.shape[1] // _PIECE * _PIECE
    sums = [weights_BV[:, :whole].unfold(1, _PIECE, _PIECE).sum(dim=-1)] if whole else []
    if whole < weights_BV.shape[1]:
        sums.append(weights_BV[:, whole:].sum(dim=-1, keepdim=True))
    return torch.cat(sums, dim=1)


def _passed(weights_BP: Tensor, targets_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first cumulative weight above the target, and what of the target is left before it."""
    cumulative_BP = weights_BP.double().cumsum(dim=1)
    index_B1 = torch.searchsorted(cumulative_BP, targets_B1, right=True)
    # Rounding may put the target at or beyond the end: then it is the last place that has any weight.
    places_P = torch.arange(weights_BP.shape[1], device=weights_BP.device)
    last_B1 = torch.where(weights_BP > 0, places_P, 0).amax(dim=1, keepdim=True)
    index_B1 = torch.minimum(index_B1, last_B1)
    before_B1 = cumulative_BP.gather(1, index_B1) - weights_BP.gather(1, index_B1)
    return index_B1, targets_B1 - before_B1
