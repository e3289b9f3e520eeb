"""Running one batch of the scheduler through the decoder: tokens in, the next tokens out.

Shapes: B rows of the batch, T tokens per row (padded on the right), D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from burnish.engine.kv_cache import CachedAttention, KVCache
from burnish.engine.sampler import Sampler
from burnish.engine.scheduler import Batch, Row
from burnish.errors import OutOfMemoryError
from burnish.models.decoder import Decoder

# A new sequence's cache is made this much longer than its prompt at once (if it may grow so far), then grows in steps.
_AHEAD = 256


class ModelRunner:
    """Owns the decoder's cache and the sampler.

    Args:
        decoder: read only here.
        max_num_seqs, max_model_len: the largest batch and length that will come.
        max_batch_tokens: without a cache, tokens computed at once; bounds the memory of activations.
        kv_cache: False computes every row from its first token and keeps nothing.
    """

    def __init__(
        self, decoder: Decoder, *, max_num_seqs: int, max_model_len: int, max_batch_tokens: int, kv_cache: bool
    ) -> None:
        self.decoder = decoder
        self.sampler = Sampler()
        self.max_batch_tokens = max_batch_tokens
        self.max_model_len = max_model_len
        self.cache = (
            KVCache(
                decoder.config,
                max_num_seqs=max_num_seqs,
                max_length=max_model_len,
                device=decoder.device,
                dtype=decoder.dtype,
            )
            if kv_cache
            else None
        )

    @torch.inference_mode()
    def run(self, batch: Batch | None) -> list[int]:
        """Compute the batch; return one new token for each row that `samples`, in the rows' order.

        Raises:
            OutOfMemoryError: the machine's memory does not hold the cache or the activations.
            BurnishError: the logits are not numbers.
        """
        if batch is None:
            return []
        with _memory_errors():
            hidden_BD = self._recomputed(batch.rows) if self.cache is None else self._cached(batch, self.cache)
            if hidden_BD is None:
                return []
            sequences = [row.sequence for row in batch.rows if row.samples]
            return self.sampler.sample(self.decoder.logits(hidden_BD), sequences)

    def _cached(self, batch: Batch, cache: KVCache) -> Tensor | None:
        """Hidden states (B', D) of the last tokens of the rows that sample, None when there are none."""
        for move in batch.moves:
            cache.move(move.source, move.target, move.length)
        rows = batch.rows
        num_new = max(row.end - row.start for row in rows)
        starts = [row.start for row in rows]
        self._reserve(cache, rows, max(starts) + num_new)
        attention = CachedAttention(cache, first_slot=rows[0].sequence.slot, starts=starts, num_new=num_new)
        tokens_BT = self._tokens(rows, num_new)
        positions_BT = torch.tensor(starts, device=tokens_BT.device)[:, None]
        if num_new > 1:
            positions_BT = positions_BT + torch.arange(num_new, device=tokens_BT.device)
        hidden_BTD = self.decoder.hidden(tokens_BT, positions_BT=positions_BT, attention=attention)
        return _last_hidden(hidden_BTD, rows)

    def _recomputed(self, rows: list[Row]) -> Tensor:
        """As `_cached`, but every row from its first token, as many rows at once as the token budget allows."""
        order = sorted(range(len(rows)), key=lambda index: rows[index].end)
        hidden: dict[int, Tensor] = {}
        while order:
            width = rows[order[-1]].end
            split = max(0, len(order) - max(1, self.max_batch_tokens // width))
            order, group = order[:split], order[split:]
            members = [rows[index] for index in group]
            last_BD = _last_hidden(self.decoder.hidden(self._tokens(members, width)), members)
            assert last_BD is not None
            hidden.update(zip(group, last_BD))
        return torch.stack([hidden[index] for index in range(len(rows))])

    def _reserve(self, cache: KVCache, rows: list[Row], needed: int) -> None:
        hoped = max(min(row.sequence.most_tokens, row.sequence.num_tokens + _AHEAD) for row in rows)
        slots = rows[-1].sequence.slot + 1
        if slots > cache.num_slots or needed > cache.capacity or (rows[0].start == 0 and hoped > cache.capacity):
            cache.reserve(slots, max(needed, min(hoped, self.max_model_len)))

    def _tokens(self, rows: list[Row], width: int) -> Tensor:
        tokens = [row.sequence.tokens(row.start, row.end) for row in rows]
        padded = [row_tokens + [0] * (width - len(row_tokens)) for row_tokens in tokens]
        return torch.tensor(padded, device=self.decoder.device)


def _last_hidden(hidden_BTD: Tensor, rows: list[Row]) -> Tensor | None:
    if hidden_BTD.shape[1] == 1:
        return hidden_BTD[:, 0]
    places = [(index, row.end - row.start - 1) for index, row in enumerate(rows) if row.samples]
    if not places:
        return None
    indices, lasts = zip(*places)
    return hidden_BTD[list(indices), list(lasts)]


@contextmanager
def _memory_errors() -> Iterator[None]:
    remedy = "Use fewer sequences at once, shorter contexts, or a smaller dtype."
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError("the device ran out of memory while generating", remedy=remedy) from error
    except MemoryError as error:
        raise OutOfMemoryError("the machine ran out of memory while generating", remedy=remedy) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError("the machine ran out of memory while generating", remedy=remedy) from error
