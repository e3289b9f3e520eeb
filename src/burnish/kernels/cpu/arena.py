"""Memory for packed weights: a few large mappings in large pages, where the system has them.

Reading weights is what a step waits for, and with pages of 2 MiB the processor has five hundred times fewer of them to
look up.
"""

from __future__ import annotations

import contextlib
import mmap
import sys

import torch
from torch import Tensor

_CHUNK = 64 << 20
_LARGE_PAGE = 2 << 20
_CACHE_LINE = 64


class Arena:
    """Hands out zeroed memory that lives as long as any tensor made from it."""

    def __init__(self) -> None:
        self._chunk: Tensor | None = None
        self._used = 0

    def zeros(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """(num_elements,) of zeros, on a cache line's boundary; the memory is taken as it is first written."""
        num_bytes = num_elements * dtype.itemsize
        begin = -(-self._used // _CACHE_LINE) * _CACHE_LINE
        if self._chunk is None or begin + num_bytes > self._chunk.numel():
            self._chunk, begin = _mapped(max(_CHUNK, num_bytes)), 0
        self._used = begin + num_bytes
        return self._chunk[begin : begin + num_bytes].view(dtype)


def _mapped(num_bytes: int) -> Tensor:
    mapping = mmap.mmap(-1, num_bytes + _LARGE_PAGE)
    if sys.platform == "linux":
        # A system without large pages says so; the memory works all the same.
        with contextlib.suppress(OSError, AttributeError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    begin = -memory.data_ptr() % _LARGE_PAGE
    return memory[begin : begin + num_bytes]
