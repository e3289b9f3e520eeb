"""From the options of a `NativeEngine` to what it runs: the model, its tokenizer, the backend and its cache."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from burnish.compress.optimise import OptimiseReport
from burnish.engine.adapters import AdapterSet
from burnish.engine.backends import choose_backend, make_backend, parse_kv_dtype, value_width
from burnish.engine.memory_budget import Demand, limit_card, plan_blocks
from burnish.engine.model_loading import open_model
from burnish.engine.prompts import TextTokenizer
from burnish.engine.requests import context_length
from burnish.engine.rope_lengths import longest_context
from burnish.engine.step import Backend
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

if TYPE_CHECKING:
    from burnish.engine.shard_group import ShardGroup


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Options of `NativeEngine`, where they are explained, as far as they decide what is made."""

    model: str | Path | Decoder
    tokenizer: TextTokenizer | None
    dtype: str | torch.dtype
    device: str | torch.device
    max_num_seqs: int
    max_model_len: int | None
    max_batch_tokens: int
    memory: str | int | None
    kv_memory: str | int | None
    kv_dtype: str | torch.dtype | None
    block_size: int
    kv_cache: bool
    backend: str
    threads: int | None
    optimise: bool | None
    quantize: str
    weights_cache: bool
    adapters: Mapping[str, str | Path] | None
    revision: str | None
    offline: bool
    allow_pickle: bool
    tensor_parallel: int
    pipeline_parallel: int
    shards: ShardGroup | None


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """What an engine runs.

    Attributes:
        config: of the whole model.
        decoder: in this process: of several processes, its part.
        optimised: what loading did to the weights; None for a model handed in.
        num_blocks, block_bytes: of the cache; a block's bytes over all layers and processes.
    """

    config: ModelConfig
    decoder: Decoder
    tokenizer: TextTokenizer | None
    optimised: OptimiseReport | None
    adapters: AdapterSet
    max_model_len: int
    backend: Backend
    num_blocks: int
    block_bytes: int
    load_s: float
    optimise_s: float


def set_up(settings: EngineSettings) -> EngineParts:
    """Load the model and make its backend, in this process or over several.

    Raises:
        ConfigError, CheckpointError: an option cannot be honoured, or the model cannot be loaded.
    """
    if settings.tensor_parallel != 1 or settings.pipeline_parallel != 1 or settings.shards is not None:
        from burnish.engine.shard_setup import set_up_shards

        return set_up_shards(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = settings.model
    limit_card(model.device if isinstance(model, Decoder) else torch.device(settings.device), settings.memory)
    loaded = open_model(
        model,
        tokenizer=settings.tokenizer,
        dtype=settings.dtype,
        device=torch.device(settings.device),
        quantize=settings.quantize,
        weights_cache=settings.weights_cache,
        revision=settings.revision,
        offline=settings.offline,
        allow_pickle=settings.allow_pickle,
    )
    decoder = loaded.decoder
    adapters = AdapterSet(decoder, settings.adapters)
    max_model_len = longest_sequence(settings, decoder.config)
    started = time.perf_counter()
    cache_dtype = parse_kv_dtype(settings.kv_dtype, dtype=decoder.dtype)
    may_change = model is not decoder if settings.optimise is None else settings.optimise
    name = choose_backend(
        decoder,
        kv_cache=settings.kv_cache,
        block_size=settings.block_size,
        kv_dtype=cache_dtype,
        backend=settings.backend,
        optimise=may_change,
        adapted_head=adapters.reaches_output_layer,
    )
    demand = demand_of(
        settings,
        config=decoder.config,
        dtype=decoder.dtype,
        device=decoder.device,
        cache_dtype=cache_dtype,
        backend=name,
        max_model_len=max_model_len,
    )
    num_blocks = plan_blocks(demand, memory=settings.memory, kv_memory=settings.kv_memory) if settings.kv_cache else 0
    made = make_backend(
        name,
        decoder,
        num_blocks=num_blocks,
        block_size=settings.block_size,
        kv_dtype=cache_dtype,
        max_batch_tokens=settings.max_batch_tokens,
        max_model_len=max_model_len,
        optimise=may_change,
    )
    assert made.kv_bytes <= num_blocks * demand.block_bytes
    adapters.attach(made)
    return EngineParts(
        config=decoder.config,
        decoder=decoder,
        tokenizer=loaded.tokenizer,
        optimised=loaded.optimised,
        adapters=adapters,
        max_model_len=max_model_len,
        backend=made,
        num_blocks=num_blocks,
        block_bytes=demand.block_bytes,
        load_s=loaded.load_s,
        optimise_s=time.perf_counter() - started,
    )


def longest_sequence(settings: EngineSettings, config: ModelConfig) -> int:
    """Most tokens of prompt and answer; raises as `context_length`."""
    return context_length(settings.max_model_len, longest=longest_context(config), unlimited=config.position == "alibi")


def demand_of(
    settings: EngineSettings,
    *,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    cache_dtype: torch.dtype,
    backend: str,
    max_model_len: int,
    processes: int = 1,
) -> Demand:
    """What the engine would like to run, for `plan_blocks`."""
    return Demand(
        config=config,
        block_size=settings.block_size,
        kv_dtype=cache_dtype,
        value_width=value_width(config.head_dim, backend=backend),
        dtype=dtype,
        device=device,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=max_model_len,
        max_batch_tokens=settings.max_batch_tokens,
        length_asked=settings.max_model_len is not None,
        processes=processes,
    )
