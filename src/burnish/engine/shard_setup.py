"""Making an engine's model over several processes: who they are, how they start, what they cannot do together."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from burnish.engine.adapters import AdapterSet
from burnish.engine.backends import parse_kv_dtype
from burnish.engine.engine_setup import EngineParts, EngineSettings, demand_of, longest_sequence
from burnish.engine.shard_backend import ShardBackend, no_adapters
from burnish.engine.shard_group import ShardGroup, here, join, listen, timeout_from_environment
from burnish.engine.shard_launch import (
    Followers,
    check_world,
    launched_rank,
    local_processes,
    start_followers,
    threads_of_each,
)
from burnish.engine.shard_rank import PartOptions
from burnish.engine.tokenizer_folder import load_tokenizer
from burnish.errors import ConfigError, WorkerError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.loading import load_config, resolve_model
from burnish.models.shard_cut import cut_model

_POLL_S = 0.02


def set_up_shards(settings: EngineSettings) -> EngineParts:
    """As `engine_setup.set_up`, over several processes; in a follower that torchrun started it does not return.

    Raises:
        ConfigError: an option is not possible over several processes, or the model cannot be cut so.
        WorkerError: the other processes did not come, or one of them died.
    """
    model = _checked(settings)
    started = time.perf_counter()
    threads = threads_of_each(settings.tensor_parallel * settings.pipeline_parallel, settings.threads)
    torch.set_num_threads(threads)
    group, followers = settings.shards, None
    if group is None:
        if launched_rank() is None:
            # What is wrong with the model itself is said before processes are started.
            folder = resolve_model(
                model, revision=settings.revision, offline=settings.offline, allow_pickle=settings.allow_pickle
            )
            _check_cut(load_config(folder), settings)
        group, followers = open_group(
            tensor_parallel=settings.tensor_parallel,
            pipeline_parallel=settings.pipeline_parallel,
            device=str(settings.device),
            threads=threads,
        )
    backend = ShardBackend(group, followers=followers, owned=settings.shards is None)
    try:
        return _load(settings, model, backend, started=started)
    except BaseException:
        backend.close()
        raise


def open_group(
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    device: str = "cpu",
    threads: int = 1,
    timeout_s: float | None = None,
    transport: str | None = None,
) -> tuple[ShardGroup, Followers | None]:
    """The group of the processes that torchrun started, else of this one and of followers that are started here.

    A follower that torchrun started follows, and exits when it is done.

    Args:
        device: "cpu" or "cuda"; each rank of a machine takes a card of its own.
        timeout_s: see `ShardGroup`; None is the variable BURNISH_SHARD_TIMEOUT, or the default.

    Raises:
        ConfigError: a card is named, or too few are here.
        WorkerError: the others did not come.
    """
    rank = launched_rank()
    timeout_s = timeout_s or timeout_from_environment()
    world = tensor_parallel * pipeline_parallel
    if rank is None:
        own = _own_device(device, 0, world, transport)
        store, address = listen(timeout_s=timeout_s)
        followers = start_followers(
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            address=address,
            device=device,
            threads=threads,
            timeout_s=timeout_s,
            transport=transport,
        )
        try:
            _wait_for(followers, store, world, timeout_s)
            group = join(
                rank=0,
                tensor_parallel=tensor_parallel,
                pipeline_parallel=pipeline_parallel,
                address=address,
                device=own,
                timeout_s=timeout_s,
                transport=transport,
                store=store,
            )
        except BaseException:
            followers.close()
            raise
        return group, followers
    check_world(tensor_parallel, pipeline_parallel)
    local = int(os.environ.get("LOCAL_RANK", rank))
    own = _own_device(device, local, local_processes(world), transport)
    group = join(
        rank=rank,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        address="env://",
        device=own,
        timeout_s=timeout_s,
        transport=transport,
    )
    if rank > 0:
        raise SystemExit(_follow(group))
    return group, None


def _follow(group: ShardGroup) -> int:
    from burnish.engine.shard_worker import follow

    try:
        follow(group)
    except WorkerError:
        return WorkerError.exit_code  # the rank that failed first says why
    except Exception as error:
        group.report(error)
        raise
    return 0


def _load(settings: EngineSettings, model: str, backend: ShardBackend, *, started: float) -> EngineParts:
    backend.load(
        PartOptions(
            model=model,
            dtype=settings.dtype,
            quantize=settings.quantize,
            memory=settings.memory,
            revision=settings.revision,
            offline=settings.offline,
            allow_pickle=settings.allow_pickle,
        )
    )
    own = backend.rank
    folder = resolve_model(
        model, revision=settings.revision, offline=settings.offline, allow_pickle=settings.allow_pickle
    )
    tokenizer = settings.tokenizer or load_tokenizer(folder)
    load_s = time.perf_counter() - started
    begun = time.perf_counter()
    max_model_len = longest_sequence(settings, own.config)
    cache_dtype = parse_kv_dtype(settings.kv_dtype, dtype=own.decoder.dtype)
    world = backend.tensor_parallel * backend.pipeline_parallel
    demand = demand_of(
        settings,
        config=own.config,
        dtype=own.decoder.dtype,
        device=backend.device,
        cache_dtype=cache_dtype,
        backend="torch",
        max_model_len=max_model_len,
        processes=local_processes(world),
    )
    num_blocks, block_bytes = 0, demand.block_bytes
    if settings.kv_cache:
        num_blocks, block_bytes = backend.plan(demand, memory=settings.memory, kv_memory=settings.kv_memory)
    backend.make_cache(num_blocks, settings.block_size, cache_dtype)
    adapters = AdapterSet(own.decoder)
    adapters.attach(backend)
    return EngineParts(
        config=own.config,
        decoder=own.decoder,
        tokenizer=tokenizer,
        optimised=replace(
            own.report,
            bytes_before=sum(each.bytes_before for each in backend.loaded),
            bytes_after=sum(each.bytes_after for each in backend.loaded),
        ),
        adapters=adapters,
        max_model_len=max_model_len,
        backend=backend,
        num_blocks=num_blocks,
        block_bytes=block_bytes,
        load_s=load_s,
        optimise_s=time.perf_counter() - begun,
    )


def _checked(settings: EngineSettings) -> str:
    """The model's name, once it is certain that nothing impossible is asked for."""
    model, group = settings.model, settings.shards
    if isinstance(model, Decoder):
        raise ConfigError(
            "a decoder in memory cannot be cut over several processes",
            remedy="Name its folder: each reads its part.",
        )
    if settings.backend not in ("auto", "torch"):
        raise ConfigError(
            f"the {settings.backend} backend cannot run in several processes", remedy="Choose backend auto or torch."
        )
    if settings.optimise is False:
        raise ConfigError("a model over several processes is always laid out for them", got="optimise False")
    if group is not None and torch.device(settings.device).type not in ("cpu", group.device.type):
        raise ConfigError("the group of processes computes elsewhere", got=settings.device, expected=group.device)
    if settings.adapters:
        raise no_adapters()
    for name, value in (
        ("tensor_parallel", settings.tensor_parallel),
        ("pipeline_parallel", settings.pipeline_parallel),
    ):
        if value < 1:
            raise ConfigError(f"{name} is out of range", got=value, expected="1 or more")
        if group is not None and value not in (1, getattr(group, name)):
            raise ConfigError(f"the group of processes has another {name}", got=value, expected=getattr(group, name))
    return str(Path(model)) if isinstance(model, Path) else model


def _check_cut(config: ModelConfig, settings: EngineSettings) -> None:
    cut_model(config, tensor_parallel=settings.tensor_parallel, pipeline_parallel=settings.pipeline_parallel)


def _own_device(device: str, place: int, processes: int, transport: str | None) -> torch.device:
    """The device of the n-th rank of this machine."""
    wanted = torch.device(device)
    if wanted.type != "cuda" or transport == "gloo":
        return wanted
    if wanted.index is not None:
        raise ConfigError("several processes cannot share one card", got=device, expected="--device cuda")
    if torch.cuda.device_count() < processes:
        raise ConfigError(
            "there are more processes than cards", got=processes, expected=f"at most {torch.cuda.device_count()}"
        )
    return torch.device("cuda", place)


def _wait_for(followers: Followers, store: object, world: int, timeout_s: float) -> None:
    """Until all followers are there; one that died on its way ends the wait."""
    deadline = time.monotonic() + timeout_s
    while not here(store, world):
        dead = followers.dead
        if dead is not None:
            raise WorkerError(f"{dead} before it was ready", remedy="Run it with BURNISH_TRACEBACK=1 to see why.")
        if time.monotonic() > deadline:
            raise WorkerError(
                f"the other processes did not start within {timeout_s:g} s",
                remedy="Raise BURNISH_SHARD_TIMEOUT (seconds) if they are only slow.",
            )
        time.sleep(_POLL_S)
