"""From the memory asked for to the number of blocks in the KV cache.

`kv_memory` is the cache alone. `memory` is the whole process (on a GPU: what it takes of the card): what is there once
the weights are loaded, what a step needs beside them, and the cache from the rest. Without either the cache is large
enough for every sequence at its longest, but takes at most a share of the memory that is free.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import psutil
import torch

from burnish.engine.block_manager import BlockManager
from burnish.errors import ConfigError
from burnish.models.config import ModelConfig
from burnish.plan.activations import working_set
from burnish.plan.overheads import ALLOCATOR_LAYERS, ALLOCATOR_LIMIT, FIRST_USE_CPU, RUNTIME_CUDA

FREE_SHARE_CPU = 0.5
FREE_SHARE_GPU = 0.85
# Block lists are Python objects: beyond this they would cost memory of their own, and nobody needs four million tokens.
MOST_BLOCKS = 1 << 18
_LOGIT_COPIES = 3
# A slab of rebuilt weights (see `kernels.gpu.weight_only`), the graphs' own memory, and laying one layer out.
_BESIDE_CUDA = 320 * 2**20
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What the engine would like to run.

    Attributes:
        kv_dtype: of the cache.
        value_width: numbers that one head's value takes in the cache, its padding included.
        dtype: of activations.
        max_model_len: longest sequence; `length_asked` tells whether somebody insists on it.
        processes: that share this machine's memory.
        whole: the model that `config` is a part of, whose windows decide what a sequence keeps; None if it is no part.
    """

    config: ModelConfig
    block_size: int
    kv_dtype: torch.dtype
    value_width: int
    dtype: torch.dtype
    device: torch.device
    max_num_seqs: int
    max_model_len: int
    max_batch_tokens: int
    length_asked: bool
    processes: int = 1
    whole: ModelConfig | None = None

    @property
    def block_bytes(self) -> int:
        """Memory of one block over all layers."""
        config = self.config
        per_head = (config.head_dim + self.value_width) * self.kv_dtype.itemsize
        per_head += 8 if self.kv_dtype == torch.int8 else 0
        return config.num_layers * config.num_kv_heads * per_head * self.block_size

    @property
    def window(self) -> int | None:
        """Most tokens that any layer looks back; None where one sees everything."""
        return longest_window(self.whole or self.config)

    @property
    def sequence_blocks(self) -> int:
        """Blocks of one sequence at its longest."""
        blocks = BlockManager(0, block_size=self.block_size, window=self.window)
        return blocks.most_blocks(self.max_model_len, chunk=self.max_batch_tokens)


def longest_window(config: ModelConfig) -> int | None:
    """Most tokens that any layer looks back, the query's own included; None where one sees everything."""
    windows = [config.window(layer) for layer in range(config.num_layers)]
    return None if None in windows else max(window for window in windows if window is not None)


def parse_bytes(size: str | int, *, name: str) -> int:
    """Bytes from "4GiB", "512 MiB", "1.5g" (always powers of 1024) or a number.

    Raises:
        ConfigError: it is not a size above 0.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(?:i?B)?\s*", size, re.IGNORECASE)
        size = -1 if match is None else int(float(match[1]) * _UNITS[match[2].upper()])
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"{name} is not a size", got=size if size != -1 else None, expected="such as 4GiB or 512MiB")
    return size


def plan_blocks(demand: Demand, *, memory: str | int | None, kv_memory: str | int | None) -> int:
    """How many blocks the cache gets; `block_bytes` times that never exceeds what was asked for.

    Raises:
        ConfigError: a size is malformed, or does not hold what has to fit.
    """
    wanted = demand.max_num_seqs * demand.sequence_blocks
    limits: list[tuple[int, str]] = []
    if kv_memory is not None:
        limits.append((parse_bytes(kv_memory, name="kv_memory"), "kv_memory"))
    if memory is not None:
        limits.append((_left_of(parse_bytes(memory, name="memory"), demand), "memory"))
    if limits:
        room, name = min(limits)
        num_blocks = room // demand.block_bytes
    else:
        room, name = int(_free(demand)), "free memory"
        num_blocks = min(wanted, room // demand.block_bytes)
    num_blocks = min(num_blocks, max(MOST_BLOCKS, demand.sequence_blocks))
    _check_enough(num_blocks, demand, room=room, name=name)
    return num_blocks


def step_bytes(demand: Demand) -> int:
    """What one step needs beside weights and cache: the widest layer's activations, and the logits."""
    config, size = demand.config, demand.dtype.itemsize
    layer = working_set(config, tokens=demand.max_batch_tokens, dtype_bytes=size, gradients=False)
    kept = min(int(ALLOCATOR_LAYERS * layer), ALLOCATOR_LIMIT) if demand.device.type == "cpu" else 0
    logits = _LOGIT_COPIES * 4 * demand.max_num_seqs * config.vocab_size
    beside = FIRST_USE_CPU["generate"] if demand.device.type == "cpu" else _BESIDE_CUDA
    return layer + kept + logits + beside


def limit_card(device: torch.device, memory: str | int | None) -> None:
    """Make torch refuse to take more of a GPU than a card of `memory` would give it, for the whole process.

    To be called before anything is loaded, so that loading has to fit as well. Does nothing on a CPU or without a size.

    Raises:
        ConfigError: the size is malformed, or the card is not so large.
    """
    if device.type != "cuda" or memory is None:
        return
    wanted = parse_bytes(memory, name="memory")
    # torch limits devices by number only.
    device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
    total = torch.cuda.get_device_properties(device).total_memory
    if wanted > total:
        raise ConfigError("memory is more than the GPU has", got=_shown(wanted), expected=f"at most {_shown(total)}")
    torch.cuda.set_per_process_memory_fraction(max(0, wanted - RUNTIME_CUDA) / total, device)


def _left_of(memory: int, demand: Demand) -> int:
    """What `memory` leaves for the cache."""
    device = demand.device
    taken = (
        RUNTIME_CUDA + torch.cuda.memory_reserved(device)
        if device.type == "cuda"
        else psutil.Process().memory_info().rss
    )
    step = step_bytes(demand)
    # One layer's blocks may be gathered, keys and values, before they are attended to.
    gathered = 1 + 1 / demand.config.num_layers
    room = int((memory - taken - step) / gathered)
    if room < demand.block_bytes:
        raise ConfigError(
            "memory is too small for this model",
            got=_shown(memory),
            expected=f"more than {_shown(taken + step + demand.block_bytes * demand.sequence_blocks)}: "
            f"{_shown(taken)} are taken once the model is loaded, a step needs {_shown(step)}, and one sequence "
            f"{_shown(demand.block_bytes * demand.sequence_blocks)} of cache",
            remedy="Raise memory, load a smaller dtype, or lower max_batch_tokens or max_model_len.",
        )
    return room


def _free(demand: Demand) -> float:
    if demand.device.type == "cuda":
        return FREE_SHARE_GPU * torch.cuda.mem_get_info(demand.device)[0]
    return FREE_SHARE_CPU * psutil.virtual_memory().available / demand.processes


def _check_enough(num_blocks: int, demand: Demand, *, room: int, name: str) -> None:
    # Without a window a shorter context will do, unless somebody insists on this one.
    least = demand.sequence_blocks if demand.length_asked or demand.window is not None else 1
    if num_blocks >= least:
        return
    length = f"a sequence of {demand.max_model_len} tokens" if least > 1 else f"{demand.block_size} tokens"
    raise ConfigError(
        f"{name} is too small for the KV cache",
        got=_shown(room),
        expected=f"at least {_shown(least * demand.block_bytes)} for {length}",
        remedy="Raise memory or kv_memory, lower max_model_len, or choose a smaller kv_dtype.",
    )


def _shown(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
