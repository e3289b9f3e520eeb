"""Rows set apart for evaluation: chosen by what they say, so that they stay apart when other rows are added.

Every row has a draw, a number made of its content and the seed. Equal rows have equal draws and fall on one side, and
so do the answers of one conversation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from burnish.errors import DataError, SettingError


def check_split(amount: float) -> None:
    """Raise unless `amount` is a share (between 0 and 1) or a number of rows.

    Raises:
        ConfigError: it is neither.
    """
    if not 0 < amount < math.inf or (amount >= 1 and amount != int(amount)):
        raise SettingError(
            "the part for evaluation, {eval_split}, is out of range",
            got=f"{amount:g}",
            expected="a share below 1, or a number of rows",
        )


def split_rows(
    keys: Sequence[int] | NDArray[np.uint64], *, amount: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the rows to train on and to evaluate on, both in order.

    Args:
        keys: 64 bits of every row's content (`encoding.content_key`).
        amount: below 1 a share, which each row falls into by itself, so that the part is of about that size and a row
            never changes sides because of others; else the number of rows, those with the smallest draws (rows equal
            to the last of them come along).
        seed: another one chooses others.

    Raises:
        ConfigError: the amount is neither a share nor a number of rows.
        DataError: nothing would be left to train on.
    """
    check_split(amount)
    draws = _draws(np.asarray(keys, dtype=np.uint64), seed)
    ordered = np.sort(draws)
    if amount < 1:
        limit = np.uint64(min(int(amount * 2.0**64), 2**64 - 1))
        limit = max(limit, ordered[0])  # one row at least
    else:
        limit = ordered[min(int(amount), len(ordered)) - 1]
    held_out = draws <= limit
    if held_out.all():
        raise DataError(
            f"no row is left to train on beside {amount:g} for evaluation",
            got=f"{len(draws)} rows, {len(np.unique(draws))} of them different",
            remedy="Take fewer for --eval-split",
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _draws(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Uniform 64 bits for each key: the finalizer of SplitMix64 (Steele et al., 2014) over the key and the seed's."""
    offset = int.from_bytes(hashlib.blake2b(f"split {seed}".encode(), digest_size=8).digest(), "little")
    mixed = keys + np.uint64(offset)  # arrays wrap around
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
