"""What the C library keeps of freed tensors, handed back."""

from __future__ import annotations

import ctypes
import sys


def trim_heap() -> None:
    """Hand the allocator's free pages back to the system; nothing where the C library cannot (musl, macOS, Windows).

    Tensors of less than 32 MiB are cut from one heap, where a few that stay keep the room of many that were freed.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
