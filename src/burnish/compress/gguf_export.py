"""Writing a decoder as a GGUF file, one tensor in memory at a time; needs the extra `gguf`.

Weights are quantized by the `gguf` package's own reference code. What a block of 32 does not divide stays float16, as
in llama.cpp's own tool; the output layer (or the embedding that serves as one) has 8 bits in a 4-bit file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish._optional import require
from burnish.compress.dense import rebuilt_weight
from burnish.compress.gguf_layout import GgufLayout, GgufTensor, gguf_layout
from burnish.compress.gguf_vocabulary import gguf_vocabulary
from burnish.data.tokenizer import Tokenizer
from burnish.errors import CheckpointError, ConfigError
from burnish.models.atomic_files import writing_to
from burnish.models.decoder import Decoder

GGUF_FORMATS = ("q8_0", "q4_0", "f16", "bf16")
BLOCK = 32
_FILE_TYPES = {"q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}


@dataclass(frozen=True, kw_only=True)
class GgufReport:
    """What was written.

    Attributes:
        kept_f16: tensors whose rows the format's blocks do not divide.
        notes: what the file or llama.cpp cannot carry.
    """

    architecture: str
    num_tensors: int
    kept_f16: tuple[str, ...]
    notes: tuple[str, ...]


def export_gguf(
    decoder: Decoder,
    path: Path,
    *,
    tokenizer: Tokenizer,
    format: str = "q8_0",
    name: str = "model",
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> GgufReport:
    """Write `path` under a temporary name and rename it when it is whole.

    Args:
        decoder: dense, or with quantized linears, which are rebuilt one by one; not changed.
        format: of the matrices: "q8_0", "q4_0", "f16" or "bf16".
        name: `general.name` in the file.
        on_tensor: called with tensors done and in all.

    Raises:
        ConfigError: llama.cpp does not compute this model, or an unknown format.
        CheckpointError: its tokenizer has no place in the file, weights that float16 cannot hold, or writing fails.
        MissingExtraError: the package `gguf` is not installed.
    """
    gguf: Any = require("gguf", extra="gguf")
    if format not in GGUF_FORMATS:
        raise ConfigError("unknown GGUF format", got=format, expected=", ".join(GGUF_FORMATS))
    layout = gguf_layout(decoder.config)
    vocabulary = gguf_vocabulary(tokenizer, vocab_size=decoder.config.vocab_size)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shapes = decoder.config.parameter_shapes()
    kept: list[str] = []
    try:
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            writer = gguf.GGUFWriter(temporary, layout.architecture)
            try:
                _add_settings(gguf, writer, layout, vocabulary.settings, format=format, name=name)
                kinds: dict[str, Any] = {}
                for tensor in layout.tensors:
                    shape = _shape(tensor, shapes)
                    kind = _quantization(gguf, tensor, shape, format)
                    if kind.name == "F16" and format in ("q8_0", "q4_0"):
                        kept.append(tensor.name)
                    kinds[tensor.name] = kind
                    stored = np.float32 if kind.name == "F32" else np.float16 if kind.name == "F16" else np.uint8
                    bytes_shape = gguf.quant_shape_to_byte_shape(shape, kind) if stored is np.uint8 else shape
                    num_bytes = int(np.prod(bytes_shape)) * np.dtype(stored).itemsize
                    writer.add_tensor_info(tensor.name, bytes_shape, np.dtype(stored), num_bytes, raw_dtype=kind)
                writer.write_header_to_file(path=temporary)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                for done, tensor in enumerate(layout.tensors, 1):
                    values = tensor_values(decoder, tensor).numpy()
                    _check_values(values, tensor.name, kinds[tensor.name].name)
                    data = gguf.quants.quantize(values, kinds[tensor.name])
                    writer.write_tensor_data(np.ascontiguousarray(data))
                    on_tensor(done, len(layout.tensors))
            finally:
                writer.close()
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return GgufReport(
        architecture=layout.architecture,
        num_tensors=len(layout.tensors),
        kept_f16=tuple(kept),
        notes=(*layout.notes, *vocabulary.notes),
    )


def tensor_values(decoder: Decoder, tensor: GgufTensor) -> Tensor:
    """The values of one of the file's tensors: float32 on the CPU, rows joined and in the file's order."""
    if tensor.values is not None:
        return torch.tensor(tensor.values, dtype=torch.float32)
    parts = []
    for place, source in enumerate(tensor.sources):
        part = dense_values(decoder, source)
        heads = tensor.rotary_heads[place] if tensor.rotary_heads else 0
        parts.append(interleave_rows(part, heads) if heads else part)
    values = parts[0] if len(parts) == 1 else torch.cat(parts)
    return values + tensor.offset if tensor.offset else values


def dense_values(decoder: Decoder, name: str) -> Tensor:
    """A parameter by its canonical name, float32 on the CPU; a quantized linear's weight is rebuilt."""
    module_name, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(module_name)
    rebuilt = rebuilt_weight(module) if leaf == "weight" else None
    values = getattr(module, leaf) if rebuilt is None else rebuilt
    return values.detach().to(device="cpu", dtype=torch.float32).contiguous()


def interleave_rows(values: Tensor, heads: int) -> Tensor:
    """Rows of each head from (first half, second half) to neighbouring pairs; the first dimension is the rows."""
    return values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _shape(tensor: GgufTensor, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    if tensor.values is not None:
        return (len(tensor.values),)
    first = shapes[tensor.sources[0]]
    return (sum(shapes[source][0] for source in tensor.sources), *first[1:])


def _quantization(gguf: Any, tensor: GgufTensor, shape: tuple[int, ...], format: str) -> Any:
    kinds = gguf.GGMLQuantizationType
    if tensor.kind == "vector" or len(shape) < 2:
        return kinds.F32
    if format in ("f16", "bf16"):
        return kinds[format.upper()]
    if shape[-1] % BLOCK:
        return kinds.F16
    return kinds.Q8_0 if tensor.kind == "output" else kinds[format.upper()]


def _check_values(values: np.ndarray, name: str, kind: str) -> None:
    """Blocks have float16 scales, so that every kind has a largest number."""
    peak = float(np.abs(values).max(initial=0.0))
    if not np.isfinite(peak):
        raise CheckpointError(f"{name} holds NaN or infinite values")
    largest = float(np.finfo(np.float16).max) * {"F16": 1, "Q4_0": 8, "Q8_0": 127}.get(kind, np.inf)
    if peak > largest:
        raise CheckpointError(f"{name} does not fit into {kind}", got=f"{peak:g}", remedy="Use --format bf16.")


def _add_settings(
    gguf: Any, writer: Any, layout: GgufLayout, vocabulary: dict[str, Any], *, format: str, name: str
) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(gguf.LlamaFileType[_FILE_TYPES[format]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    settings = {f"{layout.architecture}.{key}": value for key, value in layout.settings.items()}
    settings |= {
        key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()
    }
    for key, value in settings.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
