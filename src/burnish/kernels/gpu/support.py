"""Where the Triton kernels run, and tile sizes that fit a card's shared memory. Imports no Triton by itself.

Turing (T4, capability 7.5) has no bfloat16 and 64 KiB of shared memory for a block of threads; Ampere and later have
bfloat16 and 99 KiB or more. For Volta and Turing Triton 3.7 makes products of plain multiplications, not of their
tensor units: enough where memory is the limit, as in decoding. Pascal (P100, 6.0) is below Triton and runs on torch.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

LEAST_CAPABILITY = (7, 0)
_KIB = 1024
# What one block of threads may ask for (CUDA programming guide, table of compute capabilities).
_SHARED_BYTES = {
    (7, 0): 96,
    (7, 5): 64,
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (12, 0): 99,
}
_LEAST_SHARED = 64
# Reductions and changes of layout take some as well.
_SHARED_SHARE = 0.85


@dataclass(frozen=True, kw_only=True)
class AttentionTiles:
    """Rows of queries, keys at once, loads in flight and warps of the attention kernel."""

    rows: int
    keys: int
    stages: int
    warps: int


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a card: it runs the kernels on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run with this device and dtype; None where they can. Runs one of them on first use."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (extra gpu)"
    if interpreted():
        return None if device.type == "cpu" else "triton's interpreter is on (TRITON_INTERPRET)"
    if device.type != "cuda":
        return f"the model is on {device}"
    if device.index not in (None, torch.cuda.current_device()):
        return f"the model is on {device}, and the process works with cuda:{torch.cuda.current_device()}"
    capability = torch.cuda.get_device_capability(device)
    reason = against_capability(capability, dtype)
    return reason if reason is not None else _against_probe(device, dtype)


def against_capability(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """The part of `against` that a card's compute capability decides."""
    if capability < LEAST_CAPABILITY:
        return f"the card's compute capability is {capability[0]}.{capability[1]}, below 7.0"
    if dtype == torch.bfloat16 and capability[0] < 8:
        return "the card has no bfloat16"
    return None


def capability_of(device: torch.device) -> tuple[int, int]:
    """The card's compute capability; under the interpreter that of the smallest card."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (7, 5)


@functools.cache
def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors to keep busy."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def attention_tiles(head_dim: int, itemsize: int, capability: tuple[int, int], *, rows: int) -> AttentionTiles:
    """The largest tiles whose queries, keys and values fit the shared memory.

    Args:
        itemsize: bytes of one number as it is multiplied.
        rows: 16 for a few queries, or the most that a tile of a long row may have.
    """
    width = padded_width(head_dim)
    while True:
        for keys in (64, 32, 16):
            # Before Ampere nothing is copied to shared memory in the background: more stages would only fill it.
            for stages in (3, 2, 1) if capability[0] >= 8 else (1,):
                if _fits(rows, keys, stages, width=width, itemsize=itemsize, capability=capability):
                    return AttentionTiles(rows=rows, keys=keys, stages=stages, warps=4 if rows * width <= 8192 else 8)
        if rows == 16:
            return AttentionTiles(rows=16, keys=16, stages=1, warps=4)
        rows //= 2


def padded_width(width: int) -> int:
    """The next power of two, and what a tensor product takes at least."""
    return max(16, 1 << (width - 1).bit_length())


def _fits(rows: int, keys: int, stages: int, *, width: int, itemsize: int, capability: tuple[int, int]) -> bool:
    shared = _SHARED_BYTES.get(capability, _LEAST_SHARED) * _KIB
    if capability[0] >= 8:
        return (rows + 2 * stages * keys) * width * itemsize <= _SHARED_SHARE * shared
    # Turing's products also pass their float32 sums through shared memory, beside keys and values or the scores.
    return 4 * rows * width + max(2 * keys * width * itemsize, 4 * rows * keys) <= shared


def _against_probe(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compile and run one kernel: a driver, compiler or card that Triton does not know shows here and not in a step."""
    try:
        from burnish.kernels.gpu import twins
        from burnish.kernels.gpu.weight_only import GroupedWeight, weight_only_linear

        weight = GroupedWeight(
            codes=torch.arange(-64, 64, dtype=torch.int8, device=device).repeat(32, 1),
            scales=torch.full((1, 32), 0.01, device=device),
            zeros=None,
            in_features=128,
            group_width=128,
            bits=8,
            column_order=None,
        )
        x_MK = torch.ones((3, 128), dtype=dtype, device=device)
        found = weight_only_linear(x_MK, weight, None).float()
        expected = twins.weight_only_linear(x_MK, weight, None).float()
    except Exception as error:
        return f"triton fails on this card: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None if torch.allclose(found, expected, atol=0.02, rtol=0.02) else "triton's results on this card are wrong"
