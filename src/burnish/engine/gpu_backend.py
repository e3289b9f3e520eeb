"""Steps computed by the Triton kernels, and decoding steps replayed as CUDA graphs.

Without a card Triton's interpreter runs the same code on the CPU, graphs aside: that is for tests.

Shapes: T packed tokens, S sequences, L positions whose logits are wanted, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from burnish.engine.adapter_hooks import AdapterHooks
from burnish.engine.gpu_graphs import CudaGraph, DecodeGraphs, MakeGraph
from burnish.engine.gpu_layers import GpuBlock, add_norm, against_layers, rebuild_for_gpu
from burnish.engine.gpu_step import (
    DeviceStep,
    GpuAttention,
    Tiles,
    cache_layers,
    places_of,
    score_rule,
    tile_starts,
    upload,
)
from burnish.engine.packing import weights_bytes
from burnish.engine.paged_attention import KVStore
from burnish.engine.step import AdapterMatrices, StepInputs
from burnish.kernels.gpu.attention import PagedRows, splits_for
from burnish.kernels.gpu.support import (
    AttentionTiles,
    against,
    attention_tiles,
    capability_of,
    padded_width,
    processors_of,
)
from burnish.models.decoder import Decoder

_FEW_ROWS, _MANY_ROWS = 16, 64


def supports(decoder: Decoder) -> str | None:
    """Why the kernels cannot run this decoder; None where they can."""
    reason = against(decoder.device, decoder.dtype) or against_layers(decoder)
    if reason is not None:
        return reason
    few, _ = _tile_shapes(decoder)
    repeats = decoder.config.num_heads // decoder.config.num_kv_heads
    return None if few.rows >= repeats else f"{repeats} query heads of one key do not fit the card's shared memory"


class GpuBackend:
    """See `Backend`.

    Args:
        decoder: taken over: its blocks are rebuilt.
        kv_dtype: of the cache.
        max_model_len: longest sequence.
        graphs: replay decoding steps; None does so on a card.
        make_graph: captures a computation; None is CUDA's.
    """

    name = "gpu"

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: torch.dtype,
        max_model_len: int,
        graphs: bool | None = None,
        make_graph: MakeGraph | None = None,
    ) -> None:
        self.decoder = decoder
        self.device = decoder.device
        self.num_blocks = num_blocks
        self.block_size = block_size
        config = decoder.config
        self._dtype = decoder.dtype
        self._max_model_len = max_model_len
        self._repeats = config.num_heads // config.num_kv_heads
        self._few, self._many = _tile_shapes(decoder)
        self._rules = [score_rule(block.self_attn.spec, self.device) for block in decoder.model.layers]  # type: ignore[union-attr]
        self.packed_linears = rebuild_for_gpu(decoder)
        # Rounded to the model's dtype once, as the decoder does for every forward.
        scale = torch.tensor(config.embedding_scale, dtype=self._dtype, device=self.device)
        self._embedding_scale = None if config.embedding_scale == 1.0 else scale
        self._store = KVStore(config, num_blocks=num_blocks, block_size=block_size, dtype=kv_dtype, device=self.device)
        self._cache = cache_layers(self._store)
        self._adapters = AdapterHooks(decoder)
        self._graphs: DecodeGraphs | None = None
        # The rules that look at the length make their tables on the CPU, which no graph can hold.
        if (self.device.type == "cuda" if graphs is None else graphs) and not decoder.needs_lengths:
            if make_graph is None:
                make_graph = functools.partial(CudaGraph, pool=torch.cuda.graph_pool_handle())
            self._graphs = DecodeGraphs(
                self._ids_and_logits,
                tiles_of=self._decode_tiles,
                make_graph=make_graph,
                table_width=-(-max_model_len // block_size),
                block_size=block_size,
                device=self.device,
            )

    @property
    def kv_bytes(self) -> int:
        return self._store.num_bytes

    @property
    def weights_bytes(self) -> int:
        return weights_bytes(self.decoder)

    @property
    def captured(self) -> list[int]:
        """Numbers of sequences that have a graph."""
        return [] if self._graphs is None else self._graphs.captured

    @torch.inference_mode()
    def forward(self, step: StepInputs, *, greedy: bool) -> Tensor:
        """See `Backend.forward`."""
        if self._graphs is not None and self._graphs.takes(step):
            ids_L, logits_LV = self._graphs.run(step)
            return ids_L if greedy else logits_LV.float()
        with self._adapters.selected(step):
            hidden_TD = self._hidden(on_device := self._on_device(step))
            if len(step.logit_rows_L) == 0:
                return hidden_TD.new_empty(0, dtype=torch.int64)
            logits_LV = self._logits(hidden_TD, on_device)
        return _best(logits_LV) if greedy else logits_LV.float()

    def set_adapters(self, adapters: Sequence[AdapterMatrices | None]) -> None:
        """See `Backend.set_adapters`."""
        self._adapters.set_adapters(adapters)

    def reset(self) -> None:
        """See `Backend.reset`. The cache stays where it is: graphs hold its address."""
        store = self._store
        for tensor in (*store.keys, *store.values, *store.key_scales, *store.value_scales):
            tensor.zero_()

    @torch.inference_mode()
    def warm_up(self, max_num_seqs: int) -> None:
        """Capture the graphs that steps of up to so many sequences need; those not captured here are when needed."""
        if self._graphs is not None:
            self._graphs.capture_up_to(max_num_seqs)

    def _ids_and_logits(self, step: DeviceStep) -> tuple[Tensor, Tensor]:
        logits_LV = self._logits(self._hidden(step), step)
        return _best(logits_LV), logits_LV

    def _hidden(self, step: DeviceStep) -> Tensor:
        """(T, D) after the final norm; the same steps as `Decoder.hidden`."""
        trunk, config = self.decoder.model, self.decoder.config
        x_TD = trunk.embed_tokens(step.tokens_T)
        if self._embedding_scale is not None:
            x_TD = x_TD * self._embedding_scale
        if trunk.embed_positions is not None:
            x_TD = x_TD + trunk.embed_positions(step.positions_T)
        if trunk.embed_norm is not None:
            x_TD = trunk.embed_norm(x_TD)
        lengths_BT = None if step.lengths_T is None else step.lengths_T[None]
        tables = self.decoder.rope_tables(step.positions_T[None], self._dtype, lengths_BT)
        attention = GpuAttention(step, self._cache, self._rules)
        added_TD: Tensor | None = None
        for layer, block in enumerate(trunk.layers):
            assert isinstance(block, GpuBlock)
            rope = None if tables is None else tables[config.window(layer) is not None]
            x_TD, added_TD = block(x_TD, added_TD, rope, attention)
        return add_norm(trunk.norm, x_TD, added_TD)[1]

    def _logits(self, hidden_TD: Tensor, step: DeviceStep) -> Tensor:
        rows_L = step.logit_rows_L
        return self.decoder.logits(hidden_TD if rows_L is None else hidden_TD.index_select(0, rows_L))

    def _on_device(self, step: StepInputs) -> DeviceStep:
        few, many = (shape.rows // self._repeats for shape in (self._few, self._many))
        short_2G, long_2G = tile_starts(step.row_starts, few=few, many=many)
        arrays = [
            step.tokens_T,
            step.positions_T,
            places_of(step, block_size=self.block_size),
            step.row_starts,
            step.context_lens_S,
            step.block_tables_SN,
            step.logit_rows_L,
            short_2G,
            long_2G,
        ]
        if self.decoder.needs_lengths:
            rope_lens_T = np.repeat(step.rope_lens_S, np.diff(step.row_starts))
            arrays.append(np.maximum(rope_lens_T, step.positions_T + 1))
        tokens, positions, places, starts, contexts, tables, logit_rows, short, long, *lengths = upload(
            arrays, self.device
        )
        longest = int(step.context_lens_S.max())
        return DeviceStep(
            tokens_T=tokens,
            positions_T=positions,
            places_T=places,
            lengths_T=lengths[0] if lengths else None,
            rows=PagedRows(row_starts=starts, context_lens_S=contexts, tables_SN=tables),
            tiles=(
                self._tiles(short[0], short[1], self._few, longest=longest),
                self._tiles(long[0], long[1], self._many, longest=longest),
            ),
            logit_rows_L=logit_rows,
        )

    def _decode_tiles(self, sequences_G: Tensor, tokens_G: Tensor) -> tuple[Tiles, ...]:
        return (self._tiles(sequences_G, tokens_G, self._few, longest=self._max_model_len),)

    def _tiles(self, sequences_G: Tensor, tokens_G: Tensor, shape: AttentionTiles, *, longest: int) -> Tiles:
        splits = splits_for(
            len(sequences_G),
            self.decoder.config.num_kv_heads,
            longest=longest,
            processors=processors_of(self.device),
            keys=shape.keys,
        )
        return Tiles(sequences_G=sequences_G, tokens_G=tokens_G, shape=shape, splits=splits)


def _best(logits_LV: Tensor) -> Tensor:
    best_L, ids_L = logits_LV.max(dim=-1)
    return ids_L.masked_fill(best_L.isnan(), -1)


def _tile_shapes(decoder: Decoder) -> tuple[AttentionTiles, AttentionTiles]:
    """For rows of a few tokens, and for longer ones."""
    config = decoder.config
    repeats = padded_width(config.num_heads // config.num_kv_heads)
    capability = capability_of(decoder.device)
    few, many = (
        attention_tiles(config.head_dim, decoder.dtype.itemsize, capability, rows=max(rows, repeats))
        for rows in (_FEW_ROWS, _MANY_ROWS)
    )
    return few, many if many.rows >= repeats else few
