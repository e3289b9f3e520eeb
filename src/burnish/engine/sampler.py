"""Drawing the next token of every sequence from its logits.

What a sequence draws depends on its own logits, parameters, seed and length only, never on its neighbours: each draw
is one number made from (seed, position), so it is also the same when a sequence is computed anew. (Logits themselves
are equal up to rounding whatever the batch; a tie within that rounding may fall either way.)

Shapes: B sequences, V vocabulary, C candidate tokens in falling order.
"""

from __future__ import annotations

import math
import random
import secrets
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from burnish.engine.sequence import Sequence
from burnish.errors import BurnishError

# Top-p is looked for among this many likeliest tokens before the whole vocabulary is sorted.
_CANDIDATES = 256


class Sampler:
    """Greedy and random choice. Order of the rules: repetition penalty, minimum length, temperature, top-k, top-p,
    min-p.
    """

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[Sequence, _SeenTokens] = WeakKeyDictionary()
        self._seeds: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    def sample(self, logits_BV: Tensor, sequences: list[Sequence]) -> list[int]:
        """Choose one token per sequence.

        Args:
            logits_BV: any float dtype; may be changed in place.

        Raises:
            BurnishError: a row is NaN.
        """
        for row, sequence in enumerate(sequences):
            if sequence.params.repetition_penalty != 1.0:
                self._penalise(logits_BV[row], sequence)
            if sequence.bans_end and sequence.end_ids:
                logits_BV[row, _within(sequence.end_ids, logits_BV.shape[1])] = -math.inf
        best_B, ids_B = logits_BV.max(dim=-1)
        if best_B.isnan().any():
            raise BurnishError(
                "the model's logits are not numbers (NaN)", remedy="Try --dtype float32, or check the checkpoint."
            )
        token_ids: list[int] = ids_B.tolist()
        drawn = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
        if drawn:
            rows_BV = logits_BV if len(drawn) == len(sequences) else logits_BV[drawn]
            for row, token_id in zip(drawn, self._draw(rows_BV.float(), [sequences[row] for row in drawn])):
                token_ids[row] = token_id
        return token_ids

    def _penalise(self, logits_V: Tensor, sequence: Sequence) -> None:
        seen = self._seen.get(sequence)
        if seen is None:
            seen = self._seen[sequence] = _SeenTokens(logits_V)
        seen.update(sequence)
        penalty = sequence.params.repetition_penalty
        penalised_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
        logits_V.copy_(torch.where(seen.mask_V, penalised_V, logits_V))

    def _draw(self, logits_BV: Tensor, sequences: list[Sequence]) -> list[int]:
        device = logits_BV.device
        temperature_B = torch.tensor([sequence.params.temperature for sequence in sequences], device=device)
        top_B1 = logits_BV.amax(dim=-1, keepdim=True)
        # Shifted before it is divided: a tiny temperature must not overflow the likeliest token's logit.
        logits_BV = (logits_BV - top_B1) / temperature_B[:, None]
        weights_BV = logits_BV.exp()
        totals = weights_BV.sum(dim=-1).tolist()
        return [
            self._draw_one(weights_V, total, sequence)
            for weights_V, total, sequence in zip(weights_BV, totals, sequences)
        ]

    def _draw_one(self, weights_V: Tensor, total: float, sequence: Sequence) -> int:
        """Invert the cumulative distribution at the sequence's own random number; the largest weight is 1."""
        params = sequence.params
        point = self._uniform(sequence)
        if params.top_k == 0 and params.top_p == 1.0:
            kept_V = weights_V if params.min_p == 0 else torch.where(weights_V >= params.min_p, weights_V, 0.0)
            return _invert(kept_V, point)
        vocabulary = weights_V.shape[0]
        count = min(params.top_k or _CANDIDATES, vocabulary)
        kept_C, ids_C = weights_V.topk(count)
        if params.top_k:
            total = float(kept_C.sum())
        elif float(kept_C.sum()) < params.top_p * total:
            kept_C, ids_C = weights_V.sort(descending=True, stable=True)
        if params.top_p < 1.0:
            before_C = kept_C.cumsum(0) - kept_C
            kept_C = torch.where(before_C < params.top_p * total, kept_C, 0.0)
        if params.min_p:
            kept_C = torch.where(kept_C >= params.min_p, kept_C, 0.0)
        return int(ids_C[_invert(kept_C, point)])

    def _uniform(self, sequence: Sequence) -> float:
        seed = sequence.params.seed
        if seed is None:
            seed = self._seeds.setdefault(sequence, secrets.randbits(64))
        return random.Random(f"{seed}/{len(sequence.token_ids)}").random()


class _SeenTokens:
    """Which tokens a sequence holds, kept up to date as it grows."""

    def __init__(self, like_V: Tensor) -> None:
        self.mask_V = torch.zeros_like(like_V, dtype=torch.bool)
        self._length = 0

    def update(self, sequence: Sequence) -> None:
        self.mask_V[sequence.tokens(self._length, sequence.num_tokens)] = True
        self._length = sequence.num_tokens


def _invert(weights: Tensor, point: float) -> int:
    """The first index whose cumulative weight passes `point` times the whole; never one of weight 0."""
    cumulative = weights.double().cumsum(0)
    return int(torch.searchsorted(cumulative, cumulative[-1] * point, right=True).clamp_(max=len(weights) - 1))


def _within(token_ids: frozenset[int], vocabulary: int) -> list[int]:
    return [token_id for token_id in token_ids if token_id < vocabulary]
