"""Optimised weights kept on disk, so that a model is quantized once and then only read.

    <cache>/optimised/<key>/model.safetensors     the decoder's tensors by canonical names
    <cache>/optimised/<key>/record.json           what they are, checksums, figures; its time is that of the last use

The cache is $BURNISH_CACHE, else $XDG_CACHE_HOME/burnish, else ~/.cache/burnish. The key is a hash of the weight files'
content, config.json and the options. An entry appears whole or not at all; one that turns out to be damaged is made
anew. Beyond $BURNISH_CACHE_LIMIT (20GiB when not set, 0 keeps nothing) the entries used longest ago are removed. A
cache that cannot be written to costs a warning, never the load.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import BurnishError, CheckpointError, ConfigError
from burnish.models.atomic_files import write_text
from burnish.models.checkpoint import TensorReader, read_json_object
from burnish.models.checkpoint_writing import pending, write_safetensors

FORMAT = 1
WEIGHTS = "model.safetensors"
RECORD = "record.json"
DEFAULT_LIMIT = "20GiB"
CHUNK_BYTES = 1 << 26
Say = Callable[[str], None]


def cache_folder() -> Path:
    """Where optimised weights are kept; it need not exist."""
    chosen = os.environ.get("BURNISH_CACHE")
    if chosen:
        return Path(chosen) / "optimised"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "burnish" / "optimised"


def cache_limit() -> int:
    """Most bytes of all entries together.

    Raises:
        ConfigError: $BURNISH_CACHE_LIMIT is no size.
    """
    text = os.environ.get("BURNISH_CACHE_LIMIT") or DEFAULT_LIMIT
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])i?B?|B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError("BURNISH_CACHE_LIMIT is not a size", got=text, expected="for example 20GiB, or 0")
    return int(float(match[1]) * 1024 ** (" KMGT".index((match[2] or " ").upper())))


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One model's optimised weights, at `folder`, which may not be there yet."""

    folder: Path
    key: str

    def record(self) -> dict[str, Any] | None:
        """What was noted of it; None when there is no whole entry."""
        if not (self.folder / WEIGHTS).is_file():
            return None
        try:
            record = read_json_object(self.folder / RECORD)
        except CheckpointError:
            return {}
        return record


def entry_of(reader: TensorReader, hf_config: Mapping[str, Any], options: Mapping[str, Any]) -> CacheEntry:
    """The place of a model's weights under these options. Hashes the weight files, unless that was done before.

    Raises:
        CheckpointError: a weight file cannot be read.
    """
    paths = sorted({info.path for info in reader.tensors.values()})
    what = {
        "format": FORMAT,
        "config": dict(hf_config),
        "options": dict(options),
        "weights": [[path.name, digest] for path, digest in zip(paths, _digests(paths))],
    }
    key = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:40]
    return CacheEntry(folder=cache_folder() / key, key=key)


def read_entry(entry: CacheEntry, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Fill `tensors` from an entry, each checked against its checksum.

    Raises:
        CheckpointError: the entry is damaged or of something else.
    """
    reader = TensorReader(entry.folder)
    checksums = record.get("checksums")
    if not isinstance(checksums, dict) or set(reader.names()) != set(tensors) or set(checksums) != set(tensors):
        raise CheckpointError(f"{entry.folder} does not hold what its record says")
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        pending_sums = {}
        for name, tensor in tensors.items():
            if reader.info(name).dtype != tensor.dtype:
                raise CheckpointError(f"{entry.folder}: {name} is of another dtype")
            here = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
            reader.read_into(name, here)
            if here is not tensor:
                tensor.copy_(here)
            # While the next tensor is read.
            pending_sums[name] = pool.submit(_checksum, here)
        for name, checksum in pending_sums.items():
            if checksum.result() != checksums[name]:
                raise CheckpointError(f"{entry.folder}: {name} is damaged")
    with suppress(OSError):
        os.utime(entry.folder / RECORD)


def write_entry(entry: CacheEntry, tensors: Mapping[str, Tensor], record: Mapping[str, Any], *, say: Say) -> bool:
    """Keep `tensors`; True when they are kept. Whatever stands in the way is said in one line and otherwise ignored."""
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    limit = cache_limit()
    if num_bytes > limit:
        if limit:
            say(f"optimised weights of {_gib(num_bytes)} are not cached: BURNISH_CACHE_LIMIT is {_gib(limit)}")
        return False
    temporary = entry.folder.with_name(f".{entry.key}.{os.getpid()}.tmp")
    try:
        entry.folder.parent.mkdir(parents=True, exist_ok=True)
        _make_room(entry.folder.parent, limit - num_bytes)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        write_safetensors(temporary / WEIGHTS, {name: pending(tensor) for name, tensor in tensors.items()})
        _write_record(temporary, {**record, "checksums": {name: _checksum(one) for name, one in tensors.items()}})
        shutil.rmtree(entry.folder, ignore_errors=True)
        with suppress(OSError):  # another process may have been quicker; its entry is as good
            temporary.rename(entry.folder)
    except (OSError, BurnishError) as error:
        reason = error.message if isinstance(error, BurnishError) else f"{error.strerror or error}"
        say(f"optimised weights are not cached: {reason}")
        return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def update_record(entry: CacheEntry, changes: Mapping[str, Any]) -> None:
    """Note more about an entry; not being able to is no error."""
    record = entry.record()
    if record:
        with suppress(OSError, BurnishError):
            _write_record(entry.folder, {**record, **changes})


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def _make_room(folder: Path, limit: int) -> None:
    """Remove entries, those used longest ago first, until the rest holds at most `limit` bytes; old leftovers too."""
    entries: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        if not path.is_dir():
            continue
        with suppress(OSError):
            if path.name.startswith("."):
                if time.time() - path.stat().st_mtime > 86400:
                    shutil.rmtree(path, ignore_errors=True)
                continue
            used_s = (path / RECORD).stat().st_mtime if (path / RECORD).exists() else 0.0
            entries.append((used_s, sum(file.stat().st_size for file in path.iterdir()), path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit:
            return
        shutil.rmtree(path, ignore_errors=True)
        total -= size


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _digests(paths: list[Path]) -> list[str]:
    """A hash of each file's content, remembered by path, size and time of change."""
    memory = cache_folder() / "contents.json"
    try:
        known = read_json_object(memory) if memory.is_file() else {}
    except CheckpointError:
        known = {}
    marks = {path: _mark(path) for path in paths}
    fresh = {marks[path]: _digest(path) for path in paths if not isinstance(known.get(marks[path]), str)}
    if fresh:
        known = {**known, **fresh}
        if cache_limit():
            with suppress(OSError, BurnishError):
                memory.parent.mkdir(parents=True, exist_ok=True)
                write_text(memory, json.dumps(dict(list(known.items())[-1000:]), indent=0))
    return [str(known[marks[path]]) for path in paths]


def _mark(path: Path) -> str:
    try:
        real = path.resolve()
        status = real.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return f"{real} {status.st_size} {status.st_mtime_ns} {status.st_ino}"


def _digest(path: Path) -> str:
    """SHA-256 over the SHA-256 of each 64 MiB, several of which are hashed at once."""

    def of_chunk(start: int) -> bytes:
        hasher = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            left = CHUNK_BYTES
            while left and (block := file.read(min(left, 1 << 20))):
                hasher.update(block)
                left -= len(block)
        return hasher.digest()

    try:
        starts = range(0, path.stat().st_size, CHUNK_BYTES)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            return hashlib.sha256(b"".join(pool.map(of_chunk, starts))).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 1024**3:.2f} GiB"
