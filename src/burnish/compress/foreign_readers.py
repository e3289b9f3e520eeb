"""Reading what other programs quantized: AWQ and bitsandbytes folders, as if they were GPTQ folders or dense ones.
compressed-tensors has a module of its own.

A reader here stands in for a `TensorReader`: it shows the names and shapes that the loader expects and converts each
tensor when it is read.

**AWQ** (AutoAWQ's "gemm" layout; Lin et al., 2023, arXiv:2306.00978). Per linear: qweight (in, out / 8) and qzeros
(groups, out / 8) int32, scales (groups, out) float16. A word holds eight neighbouring *outputs* in the order
0, 2, 4, 6, 1, 3, 5, 7 of its nibbles, lowest first; zero points are stored as they are. Shown as GPTQ's second version,
which packs inputs; the weights stay in 4 bits.

**bitsandbytes** (Dettmers et al., 2023, arXiv:2305.14314, and 2022, arXiv:2208.07339). 4 bits: weight (ceil(n / 2), 1)
uint8, two codes a byte in the order of the matrix's rows, with scales per block beside it and a record in JSON. 8 bits:
weight (out, in) int8 and SCB (out,) float32, W = weight * SCB / 127. Shown dense: each weight is rebuilt once, while it
is read, in the dtype of the model. GPT-2's linears, which dense files hold (in, out), are (out, in) here too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from burnish.compress.compressed_tensors_reading import CompressedTensorsReader
from burnish.compress.converting_reader import ConvertingReader
from burnish.compress.nf4 import LEVELS, BlockFormat, BlockScales, dequantize_blocks, dynamic_levels
from burnish.compress.packing import num_words, pack
from burnish.errors import CheckpointError
from burnish.models.checkpoint import TensorReader
from burnish.models.config import ModelConfig
from burnish.models.families.registry import family_named
from burnish.models.hf_config import config_of

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which output of a word's eight its nibbles hold, lowest first."""
_STATE = ".quant_state.bitsandbytes__"
_SCALES_PER_BLOCK = 256


def foreign_reader(reader: TensorReader, hf_config: Mapping[str, Any]) -> tuple[TensorReader, Mapping[str, Any]]:
    """A reader for the folder's own way of quantizing, and config.json as the loader is to see it.

    Raises:
        CheckpointError: a folder of a kind that cannot be read.
    """
    record = hf_config.get("quantization_config")
    method = record.get("quant_method") if isinstance(record, Mapping) else None
    if not isinstance(record, Mapping) or method not in ("awq", "bitsandbytes", "compressed-tensors"):
        return reader, hf_config
    if method == "compressed-tensors":
        shown = CompressedTensorsReader(reader, hf_config)
        return shown, shown.seen_config
    if method == "awq":
        version, bits = str(record.get("version") or "gemm").lower(), record.get("bits", 4)
        if version != "gemm" or bits != 4:
            raise CheckpointError(
                f"{reader.folder}: config.json has an AWQ layout that cannot be read",
                got=f"version {version!r}, bits {bits}",
                expected="version 'gemm', bits 4",
                remedy="Use --engine transformers",
            )
        like = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2",
            "bits": 4,
            "group_size": record.get("group_size", 128),
        }
        return AwqReader(reader), {**hf_config, "quantization_config": like}
    dense = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    return BitsAndBytesReader(reader, config_of(hf_config)), dense


class AwqReader(ConvertingReader):
    """An AWQ folder, shown as a GPTQ folder of the second version.

    Raises:
        CheckpointError: a packed tensor is no matrix of int32.
    """

    def __init__(self, reader: TensorReader) -> None:
        super().__init__(reader)
        for name, info in reader.tensors.items():
            if not name.endswith((".qweight", ".qzeros")):
                self.tensors[name] = info
                continue
            if info.dtype != torch.int32 or len(info.shape) != 2:
                raise CheckpointError(f"{info.path}: {name} is not packed as AWQ's are", got=list(info.shape))
            rows, words = info.shape
            shape = (num_words(rows, 4), 8 * words) if name.endswith(".qweight") else (rows, words)
            self._show(name, torch.int32, shape)

    def make(self, name: str) -> Tensor:
        """Eight outputs a word, in AWQ's order, to eight inputs (or outputs, for zero points) a word in plain order."""
        values_RO = unpack_awq(self._source.read(name))
        return pack(values_RO, 4) if name.endswith(".qweight") else pack(values_RO.t(), 4).t()

    def read_into(self, name: str, destination: Tensor) -> None:
        """See `TensorReader.read_into`; packed tensors are converted even where the shape stays."""
        if name.endswith((".qweight", ".qzeros")):
            destination.copy_(self.make(name))
            return
        super().read_into(name, destination)


def unpack_awq(words_RW: Tensor) -> Tensor:
    """(rows, words) int32 in AWQ's order -> (rows, 8 * words) uint8."""
    values = torch.empty(*words_RW.shape, 8, dtype=torch.uint8)
    for nibble, output in enumerate(AWQ_ORDER):
        values[..., output] = ((words_RW >> (4 * nibble)) & 15).to(torch.uint8)
    return values.flatten(1)


class BitsAndBytesReader(ConvertingReader):
    """A folder that bitsandbytes quantized, in 4 or 8 bits, shown dense.

    Raises:
        CheckpointError: nothing in it is quantized, or a record is malformed.
    """

    def __init__(self, reader: TensorReader, config: ModelConfig) -> None:
        super().__init__(reader)
        self._weight_map = family_named(config.family).weight_map(config)
        self._states: dict[str, tuple[str, dict[str, Any]]] = {}
        hidden: set[str] = set()
        for name in reader.names():
            if _STATE in name:
                weight, _, kind = name.partition(_STATE)
                self._states[weight] = (kind, self._state(name))
                hidden.update(other for other in reader.names() if other.startswith(f"{weight}."))
            elif name.endswith(".SCB"):
                module = name.removesuffix(".SCB")
                hidden |= {name, f"{module}.weight_format"}
        packed = {f"{name.removesuffix('.SCB')}.weight" for name in hidden if name.endswith(".SCB")}
        if not packed and not self._states:
            raise CheckpointError(f"{reader.folder}: config.json says bitsandbytes, but no weight is quantized")
        for name, info in reader.tensors.items():
            if name in self._states or name in packed:
                rows, columns = info.shape if name in packed else self._states[name][1]["shape"]
                self._show(name, torch.float32, (columns, rows) if self._is_transposed(name) else (rows, columns))
            elif name not in hidden:
                self.tensors[name] = info

    def _is_transposed(self, name: str) -> bool:
        """Whether the family's dense files hold this weight (in, out); here it is always (out, in)."""
        placement = self._weight_map.canonical(name)
        return placement is not None and placement.transposed

    def make(self, name: str) -> Tensor:
        """The dense weight, float32, as the family's dense files hold it."""
        made = self._rebuilt(name)
        return made.t() if self._is_transposed(name) else made

    def _rebuilt(self, name: str) -> Tensor:
        if name not in self._states:
            scales_O = self._source.read(f"{name.removesuffix('weight')}SCB", dtype=torch.float32)
            return self._source.read(name).float() * (scales_O / 127)[:, None]
        kind, state = self._states[name]
        absmax = self._source.read(f"{name}.absmax")
        self._check_levels(f"{name}.quant_map", torch.tensor(LEVELS[kind]))
        double = f"{name}.nested_absmax" in self._source.tensors
        scales = BlockScales(absmax=absmax.float())
        if double:
            self._check_levels(f"{name}.nested_quant_map", dynamic_levels(torch.device("cpu")))
            scales = BlockScales(
                absmax=absmax,
                scale=self._source.read(f"{name}.nested_absmax", dtype=torch.float32),
                offset=torch.tensor(float(state["nested_offset"])),
            )
        block_format = BlockFormat(kind=kind, block_size=int(state["blocksize"]), double=double)
        out = torch.empty(tuple(state["shape"]), dtype=torch.float32)
        packed_P = self._source.read(name).reshape(-1).view(torch.uint8)
        if len(packed_P) != -(-out.numel() // 2) or absmax.numel() != block_format.num_blocks(out.numel()):
            raise CheckpointError(f"{self.info(name).path}: {name} does not hold {list(out.shape)} 4-bit weights")
        return dequantize_blocks(packed_P, scales, block_format, out)

    def _state(self, name: str) -> dict[str, Any]:
        """The record of a 4-bit weight: JSON in bytes."""
        kind = name.partition(_STATE)[2]
        try:
            state = json.loads(bytes(self._source.read(name).to(torch.uint8).tolist()))
            valid = (
                kind in LEVELS
                and int(state["blocksize"]) > 1
                and len(state["shape"]) == 2
                and int(state.get("nested_blocksize", _SCALES_PER_BLOCK)) == _SCALES_PER_BLOCK
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.folder}: the record {name} cannot be read") from error
        if not valid:
            raise CheckpointError(f"{self.folder}: the record {name} is of a kind that cannot be read", got=state)
        return state

    def _check_levels(self, name: str, expected: Tensor) -> None:
        """A file may bring levels of its own; ours are the published ones."""
        levels = self._source.read(name, dtype=torch.float32)
        if levels.shape != expected.shape or not torch.allclose(levels, expected, atol=1e-6):
            raise CheckpointError(f"{self.folder}: {name} has levels of its own", expected="the published ones")
