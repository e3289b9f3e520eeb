"""Writing safetensors folders: one tensor in memory at a time, and never a half-written file under its final name."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import CheckpointError
from burnish.models.atomic_files import replacing, write_text, writing_to
from burnish.models.checkpoint import DTYPES

MAX_SHARD_BYTES = 5_000_000_000
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PendingTensor:
    """A tensor to write: what the header says of it, and how to make it when its turn comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def pending(tensor: Tensor, *, dtype: torch.dtype | None = None) -> PendingTensor:
    """A tensor that exists already, to be written in its own dtype or (floating ones) in another."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return PendingTensor(tuple(tensor.shape), wanted, lambda: tensor)


def write_safetensors_folder(
    folder: Path,
    tensors: Mapping[str, PendingTensor],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write model.safetensors, or shards with their index, replacing what the folder had.

    Every file is written under a temporary name, flushed to disk and renamed; weights of an earlier save that are not
    replaced are removed last, so that a crash leaves old or new weights, or both with the new index.

    Args:
        max_shard_bytes: tensors' bytes per file; a larger tensor gets a file of its own.

    Returns:
        The weight files written.

    Raises:
        CapacityError: the disk is full.
        CheckpointError: a file cannot be written, or a tensor is not what it was announced to be.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shards = _shard_names(tensors, max_shard_bytes)
    single = len(shards) == 1
    names = [
        "model.safetensors" if single else f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        for n in range(1, len(shards) + 1)
    ]
    paths: list[Path] = []
    for name, keys in zip(names, shards):
        write_safetensors(folder / name, {key: tensors[key] for key in keys})
        paths.append(folder / name)
    index_path = folder / "model.safetensors.index.json"
    if not single:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors.values())},
            "weight_map": {key: name for name, keys in zip(names, shards) for key in keys},
        }
        write_text(index_path, json.dumps(index, indent=2, sort_keys=True) + "\n")
    stale = {path for path in folder.glob("model*.safetensors") if path not in paths}
    if single and index_path.exists():
        stale.add(index_path)
    for path in stale:
        path.unlink()
    return paths


def write_safetensors(
    path: Path, tensors: Mapping[str, PendingTensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file through a temporary name; errors as in `write_safetensors_folder`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    # Wide dtypes first keeps every tensor aligned to its element, which the format asks of writers.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    for name in order:
        tensor = tensors[name]
        stop = start + tensor.num_bytes
        header[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name in order:
            with torch.no_grad():
                tensor = tensors[name].make().detach().to(device="cpu", dtype=tensors[name].dtype).contiguous()
            if tuple(tensor.shape) != tensors[name].shape:
                raise CheckpointError(
                    f"{path}: {name} changed its shape while it was written",
                    got=list(tensor.shape),
                    expected=list(tensors[name].shape),
                )
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _shard_names(tensors: Mapping[str, PendingTensor], max_shard_bytes: int) -> list[Sequence[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.num_bytes
    return list(shards)
