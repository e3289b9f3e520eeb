"""One rank's part of a model: loading it, its share of the KV cache, and its share of every step.

Shapes: T packed tokens, P tokens of a piece, L positions whose logits are wanted, D hidden, V vocabulary, W ranks.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from torch import Tensor

from burnish.compress.optimise import OptimiseReport
from burnish.compress.shard_loading import load_part, survey
from burnish.engine.dtype_rule import pick_dtype
from burnish.engine.memory_budget import Demand, limit_card, plan_blocks
from burnish.engine.outputs import RankMemory
from burnish.engine.packing import weights_bytes
from burnish.engine.paged_attention import KVStore, PagedAttention
from burnish.engine.shard_group import Sent, ShardGroup
from burnish.engine.shard_layers import connect
from burnish.engine.step import StepInputs
from burnish.engine.step_pieces import cut_step
from burnish.models.checkpoint import read_config
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.host_memory import trim_heap
from burnish.models.loading import config_of, parse_dtype, resolve_model
from burnish.models.shard_cut import ShardCut, cut_model


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """What every rank has to know to load its part; the names are `NativeEngine`'s."""

    model: str
    dtype: str | torch.dtype
    quantize: str
    memory: str | int | None
    revision: str | None
    offline: bool
    allow_pickle: bool


@dataclass(frozen=True, kw_only=True)
class LoadedSizes:
    """What one rank loaded.

    Attributes:
        bytes_read: of weight files.
        bytes_before, bytes_after: see `OptimiseReport`.
        packed_linears: see `pack_decoder`.
    """

    bytes_read: int
    bytes_before: int
    bytes_after: int
    packed_linears: int


class ShardRank:
    """One rank of a group. Every method but `cut` is called on all ranks, with the same arguments.

    Args:
        group: the ranks, none of which has another model open.

    Attributes:
        config: of the whole model, once it is loaded.
        decoder: this rank's part.
        report: what loading did to the weights.
    """

    config: ModelConfig
    decoder: Decoder
    report: OptimiseReport
    cut: ShardCut

    def __init__(self, group: ShardGroup) -> None:
        self._group = group
        self._store: KVStore | None = None
        self._kept: tuple[int, int, torch.dtype] = (0, 1, torch.float32)
        self._cuts: tuple[ShardCut, ...] = ()
        self._windows: set[int | None] = set()

    def load(self, options: PartOptions) -> LoadedSizes:
        """Read this rank's part of the model.

        Raises:
            ConfigError, CheckpointError: it cannot be cut so, or cannot be loaded.
        """
        group, device = self._group, self._group.device
        limit_card(device, options.memory)
        folder = resolve_model(
            options.model, revision=options.revision, offline=options.offline, allow_pickle=options.allow_pickle
        )
        hf_config = read_config(folder)
        dtype = pick_dtype(
            options.dtype,
            num_parameters=config_of(hf_config).num_parameters(),
            stored=parse_dtype("auto", hf_config),
            device=device,
        )
        found = survey(folder, dtype=dtype, quantize=options.quantize, allow_pickle=options.allow_pickle)
        self.config = found.config
        self._cuts = cut_model(
            found.config,
            tensor_parallel=group.tensor_parallel,
            pipeline_parallel=group.pipeline_parallel,
            units=found.units,
        )
        self.cut = self._cuts[group.rank]

        def agree(tensor: Tensor) -> None:
            tensor.copy_(group.max_stage(tensor.to(device)))

        loaded = load_part(found, self.cut, device=device, agree=agree)
        self.decoder, self.report = loaded.decoder, loaded.report
        with torch.no_grad():
            packed = connect(self.decoder, self.cut, group)
        self._windows = {found.config.window(layer) for layer in range(*self.cut.layers)}
        gc.collect()
        trim_heap()  # what loading no longer needs
        return LoadedSizes(
            bytes_read=loaded.bytes_read,
            bytes_before=loaded.report.bytes_before,
            bytes_after=loaded.report.bytes_after,
            packed_linears=packed,
        )

    def plan(self, demand: Demand, memory: str | int | None, kv_memory: str | int | None) -> tuple[int, int]:
        """How many blocks this rank has room for, and what one takes of its memory.

        Args:
            demand: what the engine would like to run; its config is the whole model's.

        Raises:
            ConfigError: as `plan_blocks`.
        """
        config = self.cut.cache_config(self.config)
        if self._group.is_driver:
            config = replace(config, vocab_size=self.config.vocab_size)  # all parts' logits come together here
        own = replace(demand, config=config, whole=self.config, device=self._group.device)
        return plan_blocks(own, memory=memory, kv_memory=kv_memory), own.block_bytes

    def make_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> RankMemory:
        """Allocate this rank's share of the cache; 0 blocks for none."""
        self._kept = (num_blocks, block_size, dtype)
        self._store = self._make_store()
        return self.memory()

    def memory(self) -> RankMemory:
        """What this rank takes."""
        return RankMemory(
            rank=self._group.rank,
            weights_bytes=weights_bytes(self.decoder),
            kv_bytes=0 if self._store is None else self._store.num_bytes,
            resident_bytes=psutil.Process().memory_info().rss,
        )

    def reset(self) -> None:
        """Forget all keys and values."""
        self._store = None
        self._store = self._make_store()

    @torch.inference_mode()
    def forward(self, step: StepInputs, greedy: bool) -> Tensor | None:
        """This rank's share of a step.

        Returns:
            At the driver what `Backend.forward` returns; None elsewhere.
        """
        group, cut, decoder = self._group, self.cut, self.decoder
        x_1TD = group.sum_all(decoder.embed(self._upload(step.tokens_T)[None], self._upload(step.positions_T)[None]))
        if decoder.model.embed_norm is not None:
            x_1TD = decoder.model.embed_norm(x_1TD)
        out_1TD = self._run_stage(step, x_1TD)
        num_logits = len(step.logit_rows_L)
        if num_logits == 0:
            return torch.empty(0, dtype=torch.int64) if group.is_driver else None
        hidden_LD = x_1TD.new_empty(num_logits, x_1TD.shape[-1])
        if out_1TD is not None:
            hidden_LD = decoder.model.norm(out_1TD[0, self._upload(step.logit_rows_L)])
        if cut.pipeline_parallel > 1:
            hidden_LD = group.share(hidden_LD, source=group.world_size - group.tensor_parallel)
        logits_LV = decoder.logits(hidden_LD)
        return self._best(logits_LV) if greedy else self._whole(logits_LV.float())

    def _run_stage(self, step: StepInputs, x_1TD: Tensor) -> Tensor | None:
        """The blocks that are here; what the last stage has of them, None for the others."""
        group, cut = self._group, self.cut
        pieces = cut_step(step, cut.pipeline_parallel) if self._store is not None else [step]
        begin = 0
        done: list[Tensor] = []
        sent: list[Sent] = []
        for piece in pieces:
            end = begin + len(piece.tokens_T)
            x_1PD = x_1TD[:, begin:end]
            if cut.stage > 0:
                x_1PD = group.receive(torch.empty_like(x_1PD).contiguous(), source=group.rank - cut.tensor_parallel)
            x_1PD = self._run_blocks(piece, x_1PD)
            if cut.stage < cut.pipeline_parallel - 1:
                sent.append(group.send(x_1PD, to=group.rank + cut.tensor_parallel))
            else:
                done.append(x_1PD)
            begin = end
        for each in sent:
            each.wait()
        return torch.cat(done, dim=1) if done else None

    def _run_blocks(self, step: StepInputs, x_1PD: Tensor) -> Tensor:
        decoder = self.decoder
        attention = PagedAttention(step, self._store, windows=self._windows, device=self._group.device)
        lengths_1P = None
        if decoder.needs_lengths:
            rope_lens_P = np.repeat(step.rope_lens_S, np.diff(step.row_starts))
            lengths_1P = self._upload(np.maximum(rope_lens_P, step.positions_T + 1))[None]
        positions_1P = self._upload(step.positions_T)[None]
        return decoder.run_blocks(x_1PD, positions_1P, attention=attention, lengths_BT=lengths_1P)

    def _best(self, logits_LV: Tensor) -> Tensor | None:
        """Arg-max ids over all parts, the lowest among equals, -1 where logits are NaN."""
        best_L, ids_L = logits_LV.max(dim=-1)
        own_2L = torch.stack((best_L.double(), (ids_L + self.cut.vocab[0]).double()))
        if not self._group.is_driver:
            self._group.send(own_2L, to=0).wait()
            return None
        every = [own_2L, *[self._group.receive(torch.empty_like(own_2L), source=rank) for rank in self._followers()]]
        best_WL, ids_WL = torch.stack(every, dim=1).unbind()
        highest_L = best_WL.amax(dim=0)
        ids_L = ids_WL.masked_fill(best_WL != highest_L, torch.inf).amin(dim=0)
        return ids_L.masked_fill(best_WL.isnan().any(dim=0), -1).long()

    def _whole(self, logits_LV: Tensor) -> Tensor | None:
        """All parts' logits, float32."""
        if not self._group.is_driver:
            self._group.send(logits_LV, to=0).wait()
            return None
        parts = [logits_LV]
        for rank in self._followers():
            begin, end = self._cuts[rank].vocab
            parts.append(self._group.receive(logits_LV.new_empty(logits_LV.shape[0], end - begin), source=rank))
        return torch.cat(parts, dim=-1)

    def _followers(self) -> range:
        return range(1, self._group.world_size)

    def _make_store(self) -> KVStore | None:
        num_blocks, block_size, dtype = self._kept
        if num_blocks == 0:
            return None
        return KVStore(
            self.cut.cache_config(self.config),
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
            device=self._group.device,
            first_layer=self.cut.layers[0],
        )

    def _upload(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._group.device)
