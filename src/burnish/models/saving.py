"""From a decoder in memory to a model folder that transformers reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import CheckpointError
from burnish.models.checkpoint_writing import (
    MAX_SHARD_BYTES,
    PendingTensor,
    pending,
    write_safetensors_folder,
    write_text,
    writing_to,
)
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.dtypes import parse_dtype
from burnish.models.families.registry import family_named
from burnish.models.hf_config import config_of, read_config
from burnish.models.weight_map import Placement

COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def save_decoder(
    decoder: Decoder,
    folder: str | Path,
    *,
    source: Path | None,
    dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a decoder as a model folder that transformers (and `load_decoder`) reads.

    Args:
        source: the folder it came from: its config.json is kept where it says the same, and its tokenizer and
            generation files are copied; None writes config.json and weights only.
        dtype: of the weights in the file; their own when None.

    Raises:
        CheckpointError: a linear has been replaced by something that has no place in the files, or writing fails.
        CapacityError: the disk is full.
    """
    folder = Path(folder)
    wanted = None if dtype is None else parse_dtype(dtype)
    write_safetensors_folder(folder, pending_tensors(decoder, dtype=wanted), max_shard_bytes=max_shard_bytes)
    written = wanted or decoder.dtype
    write_config(folder, decoder.config, source=source, dtype=written)
    if source is not None:
        copy_companions(source, folder)


def pending_tensors(decoder: Decoder, *, dtype: torch.dtype | None = None) -> dict[str, PendingTensor]:
    """A dense decoder's weights under the files' names, joined and transposed as the family's files are.

    Raises:
        CheckpointError: the state_dict has names that the family's files have no place for.
    """
    state = decoder.state_dict()
    strange = sorted(set(state) - set(decoder.config.parameter_shapes()))
    if strange:
        raise CheckpointError(
            f"the model cannot be saved as dense weights: it holds {some_names(strange)}",
            remedy="Merge its adapter, or save it in its quantized format.",
        )
    weight_map = family_named(decoder.config.family).weight_map(decoder.config)
    return {
        hf_name: _pending(placement, [state[target] for target in placement.targets], dtype)
        for hf_name, placement in weight_map.placements(list(state)).items()
    }


def _pending(placement: Placement, parts: list[Tensor], dtype: torch.dtype | None) -> PendingTensor:
    if placement.rows is None and not placement.transposed:
        return pending(parts[0], dtype=dtype)
    rows = placement.rows
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def make() -> Tensor:
        joined = parts[0] if rows is None else rows.join(parts)
        return joined.t() if placement.transposed else joined

    return PendingTensor(shape[::-1] if placement.transposed else shape, dtype or parts[0].dtype, make)


def write_config(
    folder: Path,
    config: ModelConfig,
    *,
    source: Path | None,
    dtype: torch.dtype,
    changes: dict[str, Any] | None = None,
) -> None:
    """Write config.json: the source's own where it describes the same model, else one made from `config`.

    Args:
        changes: keys to set last, e.g. {"quantization_config": {...}}; a dense model has no such key.
    """
    record: dict[str, Any] | None = None
    if source is not None and (source / "config.json").exists():
        record = read_config(source)
        if config_of(record) != config:
            record = None
    if record is None:
        record = family_named(config.family).config_to_hf(config)
    record.pop("quantization_config", None)
    name = str(dtype).removeprefix("torch.")
    for key in [key for key in ("dtype", "torch_dtype") if key in record] or ["torch_dtype"]:
        record[key] = name
    record.update(changes or {})
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(record, indent=2) + "\n")


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer's and generation's files that `source` has; returns their names."""
    copied: list[str] = []
    for name in COMPANION_FILES:
        origin = source / name
        if origin.exists() and origin.resolve() != (folder / name).resolve():
            with writing_to(folder / name):
                shutil.copyfile(origin, folder / name)
            copied.append(name)
    return copied


def some_names(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
