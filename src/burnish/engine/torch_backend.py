"""Steps computed by the decoder as it is, with torch, on any device.

Shapes: T packed tokens, L positions whose logits are wanted, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from burnish.engine.adapter_hooks import AdapterHooks
from burnish.engine.packing import weights_bytes
from burnish.engine.paged_attention import KVStore, PagedAttention
from burnish.engine.step import AdapterMatrices, StepInputs
from burnish.models.decoder import Decoder


class TorchBackend:
    """A `Backend` over any decoder.

    Args:
        decoder: only read; while adapters are served it carries hooks.
        num_blocks: 0 keeps nothing: then every row has to begin at its sequence's first token.
        kv_dtype: of the cache; None is the decoder's own.
        packed_linears: how many of the decoder's linears were joined or laid out before; told to others.
    """

    name = "torch"

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: torch.dtype | None = None,
        packed_linears: int = 0,
    ) -> None:
        self.decoder = decoder
        self.device = decoder.device
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.packed_linears = packed_linears
        self._kv_dtype = kv_dtype or decoder.dtype
        config = decoder.config
        self._windows = {config.window(layer) for layer in range(config.num_layers)}
        self._store = self._make_store()
        self._adapters = AdapterHooks(decoder)

    @property
    def kv_bytes(self) -> int:
        return 0 if self._store is None else self._store.num_bytes

    @property
    def weights_bytes(self) -> int:
        return weights_bytes(self.decoder)

    @torch.inference_mode()
    def forward(self, step: StepInputs, *, greedy: bool) -> Tensor:
        """See `Backend.forward`."""
        with self._adapters.selected(step):
            return self._forward(step, greedy=greedy)

    def set_adapters(self, adapters: Sequence[AdapterMatrices | None]) -> None:
        """See `Backend.set_adapters`."""
        self._adapters.set_adapters(adapters)

    def _forward(self, step: StepInputs, *, greedy: bool) -> Tensor:
        tokens_BT = self._upload(step.tokens_T)[None]
        positions_BT = self._upload(step.positions_T)[None]
        attention = PagedAttention(step, self._store, windows=self._windows, device=self.device)
        lengths_BT = None
        if self.decoder.needs_lengths:
            rope_lens_T = np.repeat(step.rope_lens_S, np.diff(step.row_starts))
            lengths_BT = self._upload(np.maximum(rope_lens_T, step.positions_T + 1))[None]
        hidden_BTD = self.decoder.hidden(
            tokens_BT, positions_BT=positions_BT, attention=attention, lengths_BT=lengths_BT
        )
        if len(step.logit_rows_L) == 0:
            return hidden_BTD.new_empty(0, dtype=torch.int64)
        logits_LV = self.decoder.logits(hidden_BTD[0, self._upload(step.logit_rows_L)])
        if not greedy:
            return logits_LV.float()
        best_L, ids_L = logits_LV.max(dim=-1)
        return ids_L.masked_fill_(best_L.isnan(), -1)

    def reset(self) -> None:
        """See `Backend.reset`."""
        self._store = None
        self._store = self._make_store()

    def _make_store(self) -> KVStore | None:
        if self.num_blocks == 0:
            return None
        return KVStore(
            self.decoder.config,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            dtype=self._kv_dtype,
            device=self.device,
        )

    def _upload(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)
