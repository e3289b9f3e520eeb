"""From a model's name to a decoder in memory; the way back is in `saving.py`, whose functions are offered here too.

Weights are checked by name and shape before the first one is read, then read one by one into the wanted dtype, so that
the peak stays near the size of the loaded model: one fused tensor more at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.errors import CheckpointError
from burnish.models.checkpoint import TensorInfo, TensorReader
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.dtypes import parse_dtype
from burnish.models.families.registry import family_named
from burnish.models.hf_config import config_of, load_config, read_config
from burnish.models.resolve import resolve_model
from burnish.models.saving import copy_companions, pending_tensors, save_decoder, some_names, write_config
from burnish.models.weight_map import Placement, out_dim

__all__ = [
    "config_of",
    "copy_companions",
    "fill_decoder",
    "load_config",
    "load_decoder",
    "parse_dtype",
    "pending_tensors",
    "resolve_model",
    "save_decoder",
    "write_config",
]

Prepare = Callable[[Decoder, dict[str, Any]], None]


def load_decoder(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    prepare: Prepare | None = None,
) -> Decoder:
    """Build a decoder and fill it with a folder's weights.

    Args:
        model: as in `resolve_model`.
        dtype: of the parameters; "auto" takes config.json's, or the weights' own.
        prepare: called with the decoder on the meta device and the parsed config.json before any weight is read; may
            replace linears. Parameters take `dtype`; buffers of replaced modules keep the dtype they declare.

    Raises:
        CheckpointError: the folder is corrupt, keys are missing or left over, or shapes differ; names file and key.
    """
    folder = resolve_model(model, revision=revision, offline=offline, allow_pickle=allow_pickle)
    decoder, reader, hf_config = open_checkpoint(folder, dtype=dtype, allow_pickle=allow_pickle)
    if prepare is not None:
        prepare(decoder, hf_config)
    fill_decoder(decoder, reader, device=torch.device(device))
    return decoder.eval()


def open_checkpoint(
    folder: Path, *, dtype: str | torch.dtype = "auto", allow_pickle: bool = False
) -> tuple[Decoder, TensorReader, dict[str, Any]]:
    """A folder's decoder on the meta device, dense and unfilled, the reader of its weights and its config.json.

    Raises:
        CheckpointError: the folder is corrupt.
    """
    hf_config = read_config(folder)
    config = config_of(hf_config)
    reader = TensorReader(folder, allow_pickle=allow_pickle)
    if config.tie_word_embeddings and _has_own_output_layer(config, reader):
        config = replace(config, tie_word_embeddings=False)
    wanted = parse_dtype(dtype, hf_config) or _common_dtype(reader)
    return Decoder(config, device="meta", dtype=wanted).eval(), reader, hf_config


def _has_own_output_layer(config: ModelConfig, reader: TensorReader) -> bool:
    """Files may hold an output layer that config.json calls tied; it counts when it differs, as in transformers."""
    weight_map = family_named(config.family).weight_map(config)
    found: dict[str, str] = {}
    for hf_name in reader.names():
        placement = weight_map.canonical(hf_name)
        if placement is not None and placement.targets[0] in ("lm_head.weight", "model.embed_tokens.weight"):
            found[placement.targets[0]] = hf_name
    return len(found) == 2 and not reader.same(found["lm_head.weight"], found["model.embed_tokens.weight"])


def fill_decoder(decoder: Decoder, reader: TensorReader, *, device: torch.device) -> None:
    """Materialise a decoder built on meta from a folder's weights, in place; raises as `load_decoder`."""
    plan = plan_reads(decoder, reader)
    for name in list(decoder.state_dict()):
        materialise(decoder, name, device)
    read_all(reader, plan, decoder.state_dict())


def read_all(reader: TensorReader, plan: Mapping[str, Placement], filled: Mapping[str, Tensor]) -> None:
    """Read the tensors of `plan` into those of `filled`, which has memory for all their targets."""
    scratch = scratch_for(reader, [name for name in plan if not _is_direct(plan[name])])
    with torch.no_grad():
        for hf_name, placement in plan.items():
            _read(reader, hf_name, placement, [filled[target] for target in placement.targets], scratch)


def scratch_for(reader: TensorReader, names: Sequence[str]) -> Tensor:
    """One buffer for all these tensors: freed ones of many sizes would stay with the process as holes in its heap."""
    num_bytes = max((reader.info(name).num_bytes for name in names), default=0)
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu")


def plan_reads(decoder: Decoder, reader: TensorReader) -> dict[str, Placement]:
    """Where each tensor of the files goes in the decoder, in the files' order; checks names and shapes.

    Raises:
        CheckpointError: keys are missing or left over, or shapes differ; names file and key.
    """
    weight_map = family_named(decoder.config.family).weight_map(decoder.config)
    expected = decoder.state_dict()
    plan: dict[str, Placement] = {}
    left_over: list[str] = []
    filled_by: dict[str, str] = {}
    for hf_name in reader.names():
        placement = weight_map.canonical(hf_name)
        if placement is None or not all(target in expected for target in placement.targets):
            tied = placement is not None and placement.targets == ("lm_head.weight",) and decoder.lm_head is None
            if not tied and not weight_map.is_ignored(hf_name):
                left_over.append(hf_name)
            continue
        for target in placement.targets:
            if target in filled_by:
                raise CheckpointError(f"{reader.folder}: {hf_name} and {filled_by[target]} are the same weight")
            filled_by[target] = hf_name
        plan[hf_name] = placement
    missing = sorted({weight_map.hf(name).name for name in expected if name not in filled_by})
    if missing:
        raise CheckpointError(f"{reader.folder} lacks {some_names(missing)}", remedy=_hint(left_over))
    if left_over:
        raise CheckpointError(f"{reader.folder} holds tensors that the model has no place for: {some_names(left_over)}")
    for hf_name, placement in plan.items():
        _check_shape(reader.info(hf_name), placement, [expected[target] for target in placement.targets])
    return plan


def _check_shape(info: TensorInfo, placement: Placement, targets: list[Tensor]) -> None:
    shape = list(targets[0].shape)
    dim = out_dim(placement.suffix)
    if dim is not None and len(targets) > 1:
        shape[dim] = sum(target.shape[dim] for target in targets)
    if placement.transposed:
        shape.reverse()
    if list(info.shape) != shape:
        raise CheckpointError(
            f"{info.path}: {info.name} has the wrong shape", got=list(info.shape), expected=f"{shape} by config.json"
        )


def _read(reader: TensorReader, hf_name: str, placement: Placement, targets: list[Tensor], scratch: Tensor) -> None:
    if _is_direct(placement):
        reader.read_into(hf_name, targets[0])
        return
    info = reader.info(hf_name)
    fused = scratch[: info.num_bytes].view(info.dtype).view(info.shape)
    reader.read_into(hf_name, fused)
    if placement.transposed:
        fused = fused.t()
    dim = out_dim(placement.suffix)
    if placement.rows is None or dim is None:
        for target in targets:
            target.copy_(fused)
    else:
        placement.rows.split_into(fused, targets, dim=dim, name=hf_name)


def read_parts(reader: TensorReader, hf_name: str, placement: Placement, scratch: Tensor) -> dict[str, Tensor]:
    """The canonical tensors that one tensor of the files holds, by name, in the file's dtype.

    They are views of `scratch` where the layout allows, and copies otherwise: use them before the next call.
    """
    info = reader.info(hf_name)
    fused = scratch[: info.num_bytes].view(info.dtype).view(info.shape)
    reader.read_into(hf_name, fused)
    if placement.transposed:
        fused = fused.t()
    dim = out_dim(placement.suffix)
    if placement.rows is None or dim is None:
        return dict.fromkeys(placement.targets, fused)
    return dict(zip(placement.targets, placement.rows.split(fused, dim=dim, name=hf_name)))


def _is_direct(placement: Placement) -> bool:
    return placement.rows is None and not placement.transposed


def materialise(decoder: nn.Module, name: str, device: torch.device) -> None:
    """Give a parameter or buffer that is on the meta device memory, in place; its values are anything."""
    parent, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(parent)
    if leaf in module._parameters:
        old = module._parameters[leaf]
        assert old is not None
        module._parameters[leaf] = nn.Parameter(
            torch.empty(old.shape, dtype=old.dtype, device=device), requires_grad=old.requires_grad
        )
    else:
        buffer = module._buffers[leaf]
        assert buffer is not None
        module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _common_dtype(reader: TensorReader) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for info in reader.tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _hint(left_over: list[str]) -> str | None:
    return f"It holds {some_names(left_over)} instead." if left_over else None
