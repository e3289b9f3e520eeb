"""Examples on disk: a data set that was tokenized once, read row by row, larger than memory if need be.

    <folder>/tokens.bin    int32, the token ids of all examples, one after the other
    <folder>/learned.bin   uint8 for each token: 1 where it is learned
    <folder>/offsets.bin   int64, where each example begins, and where the last one ends
    <folder>/keys.bin      uint64, 64 bits of each example's content, by which the split is drawn
    <folder>/record.json   what it was made from, its figures and its preflight

Tokens are read with positional reads, not through a memory map: a map's pages would count as the process's own memory
and grow with every row that was touched. In memory are 12 bytes for each example. Files are little-endian.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from burnish.data.encoding import IGNORE
from burnish.errors import DataError

FORMAT = 1
TOKENS, LEARNED, OFFSETS, KEYS, RECORD = "tokens.bin", "learned.bin", "offsets.bin", "keys.bin", "record.json"
TOKEN_DTYPE, OFFSET_DTYPE, KEY_DTYPE = np.dtype("<i4"), np.dtype("<i8"), np.dtype("<u8")


@dataclass(frozen=True, kw_only=True)
class CachedExample:
    """One training sequence; labels are the tokens, IGNORE where nothing is learned."""

    tokens: list[int]
    labels: list[int]


class TokenCache(Sequence[CachedExample]):
    """Examples of a folder, or some of them, in a given order.

    Args:
        folder: as written by `token_cache_building`.
        numbers: which examples; all when None.

    Attributes:
        record: what `record.json` says.

    Raises:
        DataError: a file is missing, or is not as long as it should be.
    """

    def __init__(self, folder: Path, *, numbers: NDArray[np.int64] | None = None) -> None:
        self.folder = folder
        try:
            self.record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            self._offsets = np.fromfile(folder / OFFSETS, dtype=OFFSET_DTYPE)
            sizes = (folder / TOKENS).stat().st_size, (folder / LEARNED).stat().st_size
        except (OSError, ValueError) as error:
            raise _damaged(folder, str(error)) from error
        total = int(self._offsets[-1]) if len(self._offsets) else 0
        if len(self._offsets) < 2 or sizes != (total * TOKEN_DTYPE.itemsize, total):
            raise _damaged(folder, f"files of {sizes[0]} and {sizes[1]} bytes for {total} tokens")
        self._numbers = numbers
        self._tokens_file = _open(self, folder / TOKENS)
        self._learned_file = _open(self, folder / LEARNED)

    def __len__(self) -> int:
        return len(self._offsets) - 1 if self._numbers is None else len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> CachedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[CachedExample]: ...
    def __getitem__(self, index: int | slice) -> CachedExample | list[CachedExample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number = index % len(self) if self._numbers is None else self._numbers[index]
        begin, end = int(self._offsets[number]), int(self._offsets[number + 1])
        tokens = np.frombuffer(self._read(self._tokens_file, begin, end, TOKEN_DTYPE.itemsize), dtype=TOKEN_DTYPE)
        learned = np.frombuffer(self._read(self._learned_file, begin, end, 1), dtype=np.uint8)
        return CachedExample(tokens=tokens.tolist(), labels=np.where(learned, tokens, IGNORE).tolist())

    def __iter__(self) -> Iterator[CachedExample]:
        return (self[number] for number in range(len(self)))

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example, without reading them."""
        lengths = np.diff(self._offsets).astype(np.int32)
        return lengths if self._numbers is None else lengths[self._numbers]

    @property
    def keys(self) -> NDArray[np.uint64]:
        """64 bits of each example's content."""
        try:
            keys = np.fromfile(self.folder / KEYS, dtype=KEY_DTYPE)
        except OSError as error:
            raise _damaged(self.folder, str(error)) from error
        if len(keys) != len(self._offsets) - 1:
            raise _damaged(self.folder, f"{len(keys)} keys for {len(self._offsets) - 1} examples")
        return keys if self._numbers is None else keys[self._numbers]

    def subset(self, numbers: NDArray[np.int64]) -> TokenCache:
        """A view of some examples."""
        return TokenCache(self.folder, numbers=numbers if self._numbers is None else self._numbers[numbers])

    def _read(self, file: int, begin: int, end: int, size: int) -> bytes:
        content = os.pread(file, (end - begin) * size, begin * size)
        if len(content) != (end - begin) * size:
            raise _damaged(self.folder, f"{len(content)} bytes where {(end - begin) * size} should be")
        return content


def _open(owner: TokenCache, path: Path) -> int:
    """A file descriptor that is closed when its owner goes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise _damaged(path.parent, str(error)) from error
    weakref.finalize(owner, os.close, descriptor)
    return descriptor


def _damaged(folder: Path, reason: str) -> DataError:
    return DataError(f"the token cache in {folder} is damaged", got=reason, remedy="Remove the folder")
