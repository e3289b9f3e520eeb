"""Reading the weight files of a model folder. Nothing here knows a decoder; writing is in `checkpoint_writing.py`.

Weights are read with plain positioned reads, tensor by tensor, straight into memory of the wanted dtype: a mapped
file's pages would count as the process's own and double the peak. Headers are checked before any weight is read.

safetensors: 8 bytes little-endian header length, JSON header {name: {dtype, shape, data_offsets}}, then the bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from burnish.errors import CheckpointError
from burnish.models.hf_config import read_config, read_json_object
from burnish.models.shard_cut import Span

__all__ = ["DTYPES", "TensorInfo", "TensorReader", "read_config", "read_header", "read_json_object", "weight_files"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MAX_HEADER_BYTES = 100_000_000
CHUNK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a file's header describes it; `start` is its byte offset in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorReader:
    """The weights of a model folder, single file or sharded, read one tensor at a time.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards, or any *.safetensors.
        allow_pickle: also accept pytorch_model.bin (through torch's weights-only loader).

    Raises:
        CheckpointError: no weights, a shard is missing or outside the folder, or a header is corrupt.
    """

    def __init__(self, folder: Path, *, allow_pickle: bool = False) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._pickled: dict[str, Tensor] = {}
        paths = weight_files(self.folder)
        if paths:
            for path in paths:
                for info in read_header(path):
                    if info.name in self.tensors:
                        raise CheckpointError(f"{path} holds {info.name}, which {self.tensors[info.name].path} has too")
                    self.tensors[info.name] = info
            self._check_index()
        else:
            self._open_pickles(allow_pickle)

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Header of one tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        return self.tensors[name]

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, in new memory on the CPU, in its own dtype or the one wanted."""
        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=dtype or info.dtype, device="cpu")
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, destination: Tensor) -> None:
        """Fill `destination` (same shape, any dtype and device) with one tensor, a chunk at a time.

        Raises:
            CheckpointError: the shapes differ, or the file ends early.
        """
        info = self.info(name)
        if tuple(destination.shape) != info.shape:
            raise CheckpointError(
                f"{info.path}: {name} has the wrong shape", got=list(info.shape), expected=list(destination.shape)
            )
        if name in self._pickled:
            destination.copy_(self._pickled[name])
            return
        if not info.num_bytes:
            return
        with info.path.open("rb", buffering=0) as file:
            file.seek(info.start)
            if destination.dtype == info.dtype and destination.device.type == "cpu" and destination.is_contiguous():
                _fill(file, destination, info)
                return
            flat = destination.view(-1) if destination.is_contiguous() else None
            if flat is None:
                whole = torch.empty(info.shape, dtype=info.dtype, device="cpu")
                _fill(file, whole, info)
                destination.copy_(whole)
                return
            step = max(1, CHUNK_BYTES // info.dtype.itemsize)
            chunk = torch.empty(min(step, flat.numel()), dtype=info.dtype, device="cpu")
            for start in range(0, flat.numel(), step):
                piece = chunk[: min(step, flat.numel() - start)]
                _fill(file, piece, info)
                flat[start : start + piece.numel()].copy_(piece)

    def read_part(
        self, name: str, *, rows: Sequence[Span], columns: Sequence[Span] | None = None
    ) -> tuple[Tensor, int]:
        """Some rows, and of those some columns, of a tensor of one or two dimensions, one run after the other.

        Args:
            rows, columns: half-open runs; None for all columns.

        Returns:
            The part, in its own dtype and new memory on the CPU, and how many bytes were read for it.
        """
        info = self.info(name)
        if name in self._pickled:
            part = _picked(self._pickled[name], rows, columns)
            return part, part.nbytes
        height = sum(end - begin for begin, end in rows)
        spans = [(0, math.prod(info.shape[1:]))] if columns is None else columns
        width = sum(end - begin for begin, end in spans)
        shape = (height, *info.shape[1:]) if columns is None else (height, width)
        part = torch.empty(shape, dtype=info.dtype, device="cpu")
        flat = part.reshape(height, width)
        row_bytes, size, place = math.prod(info.shape[1:]) * info.dtype.itemsize, info.dtype.itemsize, 0
        with info.path.open("rb", buffering=0) as file:
            for begin, end in rows if part.numel() else ():
                if columns is None:
                    file.seek(info.start + begin * row_bytes)
                    _fill(file, flat[place : place + end - begin], info)
                    place += end - begin
                    continue
                for row in range(begin, end):
                    at = 0
                    for first, last in spans:
                        file.seek(info.start + row * row_bytes + first * size)
                        _fill(file, flat[place, at : at + last - first], info)
                        at += last - first
                    place += 1
        return part, part.nbytes

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors are equal, compared a chunk at a time."""
        one, two = self.info(name), self.info(other)
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        if name in self._pickled:
            return torch.equal(self._pickled[name], self._pickled[other])
        with one.path.open("rb") as file, two.path.open("rb") as other_file:
            file.seek(one.start)
            other_file.seek(two.start)
            for start in range(0, one.num_bytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, one.num_bytes - start)
                if file.read(size) != other_file.read(size):
                    return False
        return True

    def _check_index(self) -> None:
        index_path = self.folder / "model.safetensors.index.json"
        if not index_path.exists() or (self.folder / "model.safetensors").exists():
            return
        for name, shard in read_json_object(index_path)["weight_map"].items():
            if name not in self.tensors or self.tensors[name].path.name != shard:
                raise CheckpointError(f"{self.folder / shard} lacks {name}, which {index_path.name} promises")

    def _open_pickles(self, allow_pickle: bool) -> None:
        paths = _pickle_files(self.folder)
        if not paths:
            raise CheckpointError(f"{self.folder} has no weights", expected="*.safetensors")
        if not allow_pickle:
            raise CheckpointError(
                f"{self.folder} has only pickled weights ({paths[0].name})",
                expected="*.safetensors",
                remedy="Pass --allow-pickle to read them with torch's weights-only loader.",
            )
        for path in paths:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise CheckpointError(f"{path} cannot be read as pickled weights: {_first_line(error)}") from error
            if not isinstance(state, dict):
                raise CheckpointError(f"{path} does not hold a dictionary of tensors", got=type(state).__name__)
            for name, tensor in state.items():
                if isinstance(tensor, Tensor):
                    self._pickled[name] = tensor
                    self.tensors[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), path, 0)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, existing and inside it; empty when it has none.

    Raises:
        CheckpointError: the index is malformed, or names a shard that is missing or outside the folder.
    """
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    index_path = folder / "model.safetensors.index.json"
    if index_path.exists():
        return _shards(index_path)
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))


def _shards(index_path: Path) -> list[Path]:
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map")
    paths: list[Path] = []
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index_path} points outside its folder", got=shard, expected="a plain file name")
        if not (index_path.parent / shard).exists():
            raise CheckpointError(f"{index_path.parent / shard} is missing", remedy=f"{index_path.name} names it.")
        paths.append(index_path.parent / shard)
    return paths


def _pickle_files(folder: Path) -> list[Path]:
    index_path = folder / "pytorch_model.bin.index.json"
    if index_path.exists():
        return _shards(index_path)
    single = folder / "pytorch_model.bin"
    return [single] if single.exists() else []


def read_header(path: Path) -> list[TensorInfo]:
    """Parse and check a safetensors header: known dtypes, sizes that fit, no overlap, nothing past the end.

    Raises:
        CheckpointError: anything is wrong, naming the file and the tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is not a safetensors file, or it is truncated", got=f"{size} bytes")
            header = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} has a corrupt safetensors header") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a corrupt safetensors header", expected="a JSON object")
    infos = [_tensor_info(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    end = 8 + length
    for info in sorted(infos, key=lambda info: (info.start, info.num_bytes)):
        if info.start != end:
            raise CheckpointError(f"{path}: {info.name} overlaps another tensor or leaves a gap")
        end += info.num_bytes
    if end != size:
        problem = "is truncated" if end > size else "has bytes that no tensor owns"
        raise CheckpointError(f"{path} {problem}", got=f"{size} bytes", expected=f"{end} bytes")
    return infos


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        valid = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry of {name} is malformed") from error
    if not valid:
        raise CheckpointError(f"{path}: the header's entry of {name} is malformed")
    if kind not in DTYPES:
        raise CheckpointError(f"{path}: {name} has an unknown dtype", got=kind, expected=", ".join(DTYPES))
    info = TensorInfo(name, DTYPES[kind], tuple(shape), path, data_start + start)
    if info.num_bytes != stop - start:
        raise CheckpointError(
            f"{path}: {name} has a shape that its bytes do not fill",
            got=f"{stop - start} bytes",
            expected=f"{info.num_bytes} for {kind} {list(shape)}",
        )
    return info


def _fill(file: BinaryIO, tensor: Tensor, info: TensorInfo) -> None:
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        try:
            count = file.readinto(view[done : done + (1 << 30)])  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError(f"{info.path} cannot be read: {error.strerror or error}") from error
        if not count:
            raise CheckpointError(f"{info.path} ends inside {info.name}")
        done += count


def _picked(tensor: Tensor, rows: Sequence[Span], columns: Sequence[Span] | None) -> Tensor:
    part = torch.cat([tensor[begin:end] for begin, end in rows])
    return part if columns is None else torch.cat([part[:, begin:end] for begin, end in columns], dim=1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
