"""Which rows to put together so that each group holds about the same number of tokens. Torch-free, pure functions."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray


def pack_rows(lengths: Sequence[int] | NDArray[np.integer], max_tokens: int) -> list[list[int]]:
    """Groups of row numbers of at most `max_tokens` tokens together: best-fit decreasing, no row is split.

    Rows go, longest first, into the fullest group that still has room, or into a new one: Ding et al., 2024,
    arXiv:2404.10830, section 3. The fullest group is found by bisection over the different rooms that groups have left,
    so n rows take O(n log n) comparisons; there are never more different rooms than the square root of twice all
    tokens, which keeps that list short. The result depends on the lengths alone; among equals, the earlier row and the
    earlier group come first. A row longer than `max_tokens` stands alone.

    Args:
        lengths: tokens of each row.
        max_tokens: most tokens of a group.

    Raises:
        ValueError: `max_tokens` is below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected at least 1")
    sizes = np.asarray(lengths, dtype=np.int64)
    groups: list[list[int]] = []
    rooms: list[int] = []  # different rooms that are left, sorted
    waiting: dict[int, list[int]] = {}  # room -> groups with exactly that room, a heap
    for row in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[row])
        place = bisect_left(rooms, size)
        if place == len(rooms):
            groups.append([row])
            number, left = len(groups) - 1, max_tokens - size
        else:
            room = rooms[place]
            number, left = heappop(waiting[room]), room - size
            groups[number].append(row)
            if not waiting[room]:
                del waiting[room], rooms[place]
        if left > 0:
            if left not in waiting:
                insort(rooms, left)
                waiting[left] = []
            heappush(waiting[left], number)
    return groups


def cut_step(lengths: Sequence[int] | NDArray[np.integer], max_rows: int, max_tokens: int | None) -> list[list[int]]:
    """Places of a step's rows in each of its micro-batches.

    Args:
        lengths: positions of each row.
        max_rows: most rows of a micro-batch.
        max_tokens: most positions of one, see `pack_rows`; None cuts by rows alone, in order.
    """
    groups = [list(range(len(lengths)))] if max_tokens is None else pack_rows(lengths, max_tokens)
    return [group[start : start + max_rows] for group in groups for start in range(0, len(group), max_rows)]


def pack_in_order(lengths: Sequence[int] | NDArray[np.integer], max_tokens: int) -> list[list[int]]:
    """Groups of neighbouring rows of at most `max_tokens` tokens together; a longer row stands alone."""
    groups: list[list[int]] = []
    held = max_tokens
    for row, size in enumerate(np.asarray(lengths, dtype=np.int64).tolist()):
        if not groups or held + size > max_tokens:
            groups.append([])
            held = 0
        groups[-1].append(row)
        held += size
    return groups
