"""Choosing what computes the steps, and in which dtype the cache is kept."""

from __future__ import annotations

import torch

from burnish.engine.packing import pack_decoder
from burnish.engine.step import Backend
from burnish.engine.torch_backend import TorchBackend
from burnish.errors import ConfigError
from burnish.kernels.cpu.packing import LANES
from burnish.models.decoder import Decoder

BACKENDS = ("auto", "torch", "cpu", "gpu")
KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


def parse_kv_dtype(kv_dtype: str | torch.dtype | None, *, dtype: torch.dtype) -> torch.dtype:
    """The cache's dtype from its name; `dtype`, the model's, for None or "auto".

    Raises:
        ConfigError: the name is unknown.
    """
    if kv_dtype is None or kv_dtype == "auto":
        return dtype
    found = KV_DTYPES.get(str(kv_dtype).removeprefix("torch."))
    if found is None:
        raise ConfigError("unknown kv_dtype", got=kv_dtype, expected=f"auto, {', '.join(KV_DTYPES)}")
    return found


def choose_backend(
    decoder: Decoder,
    *,
    kv_cache: bool,
    block_size: int,
    kv_dtype: torch.dtype,
    backend: str,
    optimise: bool,
    adapted_head: bool = False,
) -> str:
    """The name of the one asked for, or of the fastest that can run this decoder without a second copy of its weights.

    Args:
        adapted_head: some adapter changes the output layer.

    Raises:
        ConfigError: the name is unknown, or that backend cannot run this decoder.
    """
    if backend not in BACKENDS:
        raise ConfigError("unknown backend", got=backend, expected=", ".join(BACKENDS))
    # The compiled kernels keep the weights in a layout of their own: where the decoder has to stay as it is they would
    # be there twice.
    if backend == "torch" or (backend == "auto" and not optimise):
        return "torch"
    wanted = ("gpu" if decoder.device.type == "cuda" else "cpu") if backend == "auto" else backend
    if wanted == "gpu":
        reason = _against_gpu(decoder, kv_cache=kv_cache, optimise=optimise)
    else:
        reason = _against_cpu(decoder, kv_cache=kv_cache, block_size=block_size, kv_dtype=kv_dtype)
        if reason is None and adapted_head:
            reason = "an adapter changes the output layer"
    if reason is None:
        return wanted
    if backend != "auto":
        raise ConfigError(f"the {backend} backend cannot run this: {reason}", remedy="Choose backend auto or torch.")
    return "torch"


def value_width(head_dim: int, *, backend: str) -> int:
    """Numbers that one head's value takes in this backend's cache: the compiled kernels pad to whole vectors."""
    return -(-head_dim // LANES) * LANES if backend == "cpu" else head_dim


def make_backend(
    name: str,
    decoder: Decoder,
    *,
    num_blocks: int,
    block_size: int,
    kv_dtype: torch.dtype,
    max_batch_tokens: int,
    max_model_len: int,
    optimise: bool,
) -> Backend:
    """Make the backend that `choose_backend` named.

    Args:
        num_blocks: 0 for no cache at all.
        max_batch_tokens, max_model_len: the largest step and the longest sequence to come.
        optimise: the decoder's linears may be joined, laid out anew and taken over; else it stays as it is.
    """
    if name == "cpu":
        from burnish.engine.cpu_backend import CpuBackend

        return CpuBackend(
            decoder,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_dtype=kv_dtype,
            consume=optimise,
            max_tokens=max_batch_tokens,
            max_model_len=max_model_len,
        )
    if name == "gpu":
        from burnish.engine.gpu_backend import GpuBackend

        return GpuBackend(
            decoder, num_blocks=num_blocks, block_size=block_size, kv_dtype=kv_dtype, max_model_len=max_model_len
        )
    return TorchBackend(
        decoder,
        num_blocks=num_blocks,
        block_size=block_size,
        kv_dtype=kv_dtype,
        packed_linears=pack_decoder(decoder) if optimise else 0,
    )


def _against_cpu(decoder: Decoder, *, kv_cache: bool, block_size: int, kv_dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot be used; None where they can."""
    if not kv_cache:
        return "it always keeps a cache"
    if decoder.device.type != "cpu":
        return f"the model is on {decoder.device}"
    try:
        from burnish.engine import cpu_backend
    except ImportError as error:
        return f"its kernels are not built ({error})"
    return cpu_backend.supports(decoder, kv_dtype, block_size=block_size)


def _against_gpu(decoder: Decoder, *, kv_cache: bool, optimise: bool) -> str | None:
    """Why the Triton kernels cannot be used; None where they can."""
    if not kv_cache:
        return "it always keeps a cache"
    if not optimise:
        return "it takes the decoder's weights over, and this one has to stay as it is"
    try:
        from burnish.engine import gpu_backend
    except ImportError as error:
        return f"triton is not installed (extra gpu): {error}"
    return gpu_backend.supports(decoder)
