"""Model folders in the common GPTQ layout: config.json with a quantization_config, safetensors under the files' names.

Per linear: qweight (ceil(in * bits / 32), out) and qzeros (groups, ceil(out * bits / 32)) int32, scales (groups, out)
float16, g_idx (in,) int32. Zero points are stored less one ("gptq", the first version of the layout); "gptq_v2" stores
them as they are and is only read. AutoGPTQ, GPTQModel, transformers and vLLM read this.

**Sizes that do not fill words.** The layout has no rule of its own for in or out features whose bits do not fill 32-bit
words. Here the last word is filled with zero bits, the buffer sizes that GPTQModel gives such layers; g_idx says how
many input features count. `odd_linears` names them: programs that insist on whole words (vLLM, AutoGPTQ's kernels)
refuse such a folder. A model whose sizes are multiples of 32 has none.

**Fused linears.** Rows (out features) are quantized independently, so the parts of a fused q/k/v are joined row by row
as the family's weight map says and packed once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.compress.config import BITS, PER_CHANNEL, QuantizeConfig
from burnish.compress.group_linear import PACKED, GroupQuantizedLinear
from burnish.compress.packing import WORD_BITS
from burnish.compress.quantized_weight import QuantizedWeight
from burnish.errors import CheckpointError, CompressionError
from burnish.models.checkpoint_writing import (
    MAX_SHARD_BYTES,
    PendingTensor,
    pending,
    write_safetensors_folder,
)
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.families.registry import family_named
from burnish.models.loading import copy_companions, write_config
from burnish.models.weight_map import Placement, Rows

CHECKPOINT_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""The layout's versions and what their stored zero points lack."""


@dataclass(frozen=True, kw_only=True)
class LinearFormat:
    """How one linear of a file is stored."""

    bits: int
    group_size: int
    zero_offset: int


@dataclass(frozen=True, kw_only=True)
class GptqFolderConfig:
    """What a config.json's quantization_config says.

    Attributes:
        default: for linears that no override names.
        overrides: (regular expression on the file's module name, changed fields; None for "stays dense"), in order.
    """

    default: LinearFormat
    overrides: tuple[tuple[re.Pattern[str], Mapping[str, Any] | None], ...] = ()

    def format_of(self, hf_module: str) -> LinearFormat | None:
        """How this module is stored; None when it stays dense."""
        for pattern, changes in self.overrides:
            if pattern.match(hf_module):
                if changes is None:
                    return None
                return LinearFormat(
                    bits=changes.get("bits", self.default.bits),
                    group_size=changes.get("group_size", self.default.group_size),
                    zero_offset=self.default.zero_offset,
                )
        return self.default


def read_quantization_config(hf_config: Mapping[str, Any]) -> GptqFolderConfig | None:
    """The quantization of a parsed config.json; None for a dense model.

    Raises:
        CheckpointError: it is quantized in a way that is not GPTQ, or a value is out of range.
    """
    record = hf_config.get("quantization_config")
    if record is None:
        return None
    if not isinstance(record, Mapping):
        raise CheckpointError("config.json's quantization_config is no object", got=repr(record))
    method = record.get("quant_method")
    if method != "gptq":
        raise CheckpointError(
            "config.json has a quantization_config of a method that cannot be read",
            got=repr(method),
            expected="'gptq'",
            remedy="Use --engine transformers, or start from the dense model",
        )
    version = record.get("checkpoint_format") or record.get("format") or "gptq"
    if version not in CHECKPOINT_FORMATS:
        raise CheckpointError(
            "config.json has a GPTQ checkpoint_format that cannot be read",
            got=repr(version),
            expected=" or ".join(map(repr, CHECKPOINT_FORMATS)),
        )
    default = LinearFormat(
        bits=record.get("bits", 4),
        group_size=record.get("group_size", 128),
        zero_offset=CHECKPOINT_FORMATS[version],
    )
    dynamic = record.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise CheckpointError("config.json's quantization_config has a dynamic that is no object", got=repr(dynamic))
    overrides = []
    for key, changes in dynamic.items():
        stays_dense = key.startswith("-:")
        try:
            pattern = re.compile(key.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise CheckpointError(
                f"config.json's dynamic has a pattern that cannot be read: {key}", got=error
            ) from error
        if not stays_dense and not isinstance(changes, Mapping):
            raise CheckpointError(f"config.json's dynamic says nothing of {key}", got=repr(changes))
        overrides.append((pattern, None if stays_dense else changes))
    folder_config = GptqFolderConfig(default=default, overrides=tuple(overrides))
    for bits, group_size in [(default.bits, default.group_size), *_overridden(folder_config)]:
        if (
            bits not in (2, 3, 4, 8)
            or not isinstance(group_size, int)
            or (group_size < 1 and group_size != PER_CHANNEL)
        ):
            raise CheckpointError(
                "config.json's quantization_config is out of range",
                got=f"bits {bits}, group_size {group_size}",
                expected="bits 2, 3, 4 or 8, and a positive group_size or -1",
            )
    return folder_config


def _overridden(config: GptqFolderConfig) -> list[tuple[Any, Any]]:
    default = config.default
    return [
        (changes.get("bits", default.bits), changes.get("group_size", default.group_size))
        for _, changes in config.overrides
        if changes is not None
    ]


def quantization_config(config: QuantizeConfig) -> dict[str, Any]:
    """What config.json says of a model quantized with `config`."""
    return {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.activation_order and config.group_size != PER_CHANNEL,
        "sym": config.symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "damp_percent": config.damping,
        "true_sequential": config.true_sequential,
        "static_groups": False,
        "meta": {"quantizer": ["burnish"], "method": config.method},
    }


def quantized_linears(decoder: Decoder) -> dict[str, GroupQuantizedLinear]:
    """The quantized linears of a decoder by canonical name."""
    return {name: module for name, module in decoder.named_modules() if isinstance(module, GroupQuantizedLinear)}


def odd_linears(decoder: Decoder) -> list[str]:
    """Names of quantized linears whose packed rows or columns end inside a word; strict loaders refuse them."""
    return [
        name
        for name, layer in quantized_linears(decoder).items()
        if layer.in_features * layer.bits % WORD_BITS or layer.out_features * layer.bits % WORD_BITS
    ]


def stored_bits(out_features: int, in_features: int, *, bits: int, group_size: int) -> int:
    """Bits that a linear of this shape takes in the files, its bias left out."""
    layer = GroupQuantizedLinear(in_features, out_features, bits=bits, group_size=group_size, device="meta")
    return 8 * sum(getattr(layer, name).nbytes for name in PACKED)


def can_store(config: ModelConfig, name: str, bits: int) -> bool:
    """Whether the family's files can hold this linear at this width: parts of fused ones have to fill whole words."""
    weight_map = family_named(config.family).weight_map(config)
    for placement in weight_map.placements([f"{name}.qweight"]).values():
        if placement.rows is not None:
            return not _open_blocks(placement.rows, bits)
    return True


def _open_blocks(rows: Rows, bits: int) -> list[int]:
    """Rows of the blocks that end inside a word, where a reader has to cut packed zero points."""
    return [count for _, count in rows.blocks if count * bits % WORD_BITS] if len(rows.blocks) > 1 else []


def save_quantized(
    decoder: Decoder,
    folder: str | Path,
    *,
    source: Path | None,
    config: QuantizeConfig,
    widths: Mapping[str, int] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a quantized decoder as a model folder in the common GPTQ layout.

    Args:
        decoder: from `quantize_model` or `load_model`; not changed.
        folder: made when missing; what it held under the same names is replaced.
        source: the parent's folder: its config.json is kept where it says the same, its tokenizer and generation files
            are copied.
        config: what the decoder was quantized with.
        widths: bits of linears by canonical name, where they are not the config's; written as "dynamic" overrides.

    Raises:
        CompressionError: nothing is quantized, or a layer's bits or groups are not what `config` says.
        CheckpointError: parts of a fused linear do not fit together, or writing fails.
        CapacityError: the disk is full.
    """
    folder = Path(folder)
    linears = quantized_linears(decoder)
    if not linears:
        raise CompressionError("the model has no quantized linears to save", remedy="Quantize it first")
    for name, layer in linears.items():
        expected_bits = (widths or {}).get(name, config.bits)
        if (layer.bits, layer.group_size) != (expected_bits, config.group_size):
            raise CompressionError(
                f"{name} is not quantized as the config says",
                got=f"bits {layer.bits}, group_size {layer.group_size}",
                expected=f"bits {expected_bits}, group_size {config.group_size}",
            )
    tensors = dense_tensors(decoder) | _packed_tensors(decoder, linears)
    write_safetensors_folder(folder, tensors, max_shard_bytes=max_shard_bytes)
    write_config(
        folder,
        decoder.config,
        source=source,
        dtype=decoder.dtype,
        changes={"quantization_config": quantization_config(config) | _overrides(decoder, config, widths or {})},
    )
    if source is not None:
        copy_companions(source, folder)


def _overrides(decoder: Decoder, config: QuantizeConfig, widths: Mapping[str, int]) -> dict[str, Any]:
    """The "dynamic" record, as GPTQModel writes it, of the linears whose bits are not the config's."""
    weight_map = family_named(decoder.config.family).weight_map(decoder.config)
    changed = {weight_map.hf_module(name).name: bits for name, bits in widths.items() if bits != config.bits}
    dynamic = {f"+:^{re.escape(module)}$": {"bits": bits} for module, bits in changed.items()}
    return {"dynamic": dynamic} if dynamic else {}


def dense_tensors(decoder: Decoder) -> dict[str, PendingTensor]:
    """Everything that is not packed: embeddings, norms, output layer and all biases."""
    weight_map = family_named(decoder.config.family).weight_map(decoder.config)
    # Not decoder.state_dict(): it would pack every layer at once for names that are not wanted here.
    state = {name: parameter.data for name, parameter in decoder.named_parameters()}
    return {
        hf_name: _fused(placement, [state[target] for target in placement.targets])
        for hf_name, placement in weight_map.placements(list(state)).items()
    }


def _fused(placement: Placement, parts: list[Tensor]) -> PendingTensor:
    if placement.rows is None and not placement.transposed:
        return pending(parts[0])
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def make() -> Tensor:
        whole = joined(placement.rows, parts)
        return whole.t() if placement.transposed else whole

    return PendingTensor(shape[::-1] if placement.transposed else shape, parts[0].dtype, make)


def _packed_tensors(decoder: Decoder, linears: Mapping[str, GroupQuantizedLinear]) -> dict[str, PendingTensor]:
    """The packed tensors of every file linear, packed when its turn to be written comes."""
    weight_map = family_named(decoder.config.family).weight_map(decoder.config)
    tensors: dict[str, PendingTensor] = {}
    for hf_name, placement in weight_map.placements([f"{name}.qweight" for name in linears]).items():
        hf_module = hf_name.removesuffix(".qweight")
        parts = [linears.get(target.removesuffix(".qweight")) for target in placement.targets]
        present = [part for part in parts if part is not None]
        if len(present) != len(parts):
            raise CheckpointError(f"{hf_module} is quantized in part only", expected="all or none of its parts")
        shapes = _packed_shapes(present)
        check_divides(hf_module, placement.rows, present[0].bits)
        make = _Packing(hf_module, placement.rows, present)
        for suffix in PACKED:
            dtype = torch.int32 if suffix != "scales" else present[0].scales_dtype
            tensors[f"{hf_module}.{suffix}"] = PendingTensor(shapes[suffix], dtype, partial(make, suffix))
    return tensors


def _packed_shapes(parts: list[GroupQuantizedLinear]) -> dict[str, tuple[int, ...]]:
    first = parts[0]
    whole = GroupQuantizedLinear(
        first.in_features,
        sum(part.out_features for part in parts),
        bits=first.bits,
        group_size=first.group_size,
        device="meta",
    )
    return {name: tuple(getattr(whole, name).shape) for name in PACKED}


def check_divides(hf_module: str, rows: Rows | None, bits: int) -> None:
    """A reader cuts packed zero points between the parts, which takes parts that fill whole words."""
    if rows is not None and (counts := _open_blocks(rows, bits)):
        fitting = " or ".join(str(other) for other in BITS if not _open_blocks(rows, other))
        raise CheckpointError(
            f"{hf_module} cannot be stored: its parts end inside a packed word",
            got=f"blocks of {counts[0]} rows",
            remedy=f"Use {fitting} bits" if fitting else None,
        )


class _Packing:
    """Packs one linear of the files once, and lets go of it when its last tensor is taken."""

    def __init__(self, hf_module: str, rows: Rows | None, parts: list[GroupQuantizedLinear]) -> None:
        self._arguments = (hf_module, rows, parts)
        self._packed: dict[str, Tensor] = {}

    def __call__(self, suffix: str) -> Tensor:
        if suffix not in self._packed:
            self._packed = _pack(*self._arguments)
        return self._packed.pop(suffix)


def _pack(hf_module: str, rows: Rows | None, parts: list[GroupQuantizedLinear]) -> dict[str, Tensor]:
    """The packed tensors of a linear of the files made of `parts`."""
    quantized = [part.quantized() for part in parts]
    first = quantized[0]
    if any(not torch.equal(each.g_idx, first.g_idx) for each in quantized):
        raise CheckpointError(
            f"the parts of {hf_module} have different group orders", remedy="Quantize without activation_order"
        )
    whole = QuantizedWeight(
        ints=joined(rows, [each.ints for each in quantized]),
        scales=joined(rows, [each.scales for each in quantized]),
        zeros=joined(rows, [each.zeros for each in quantized]),
        g_idx=first.g_idx,
        bits=first.bits,
        group_size=first.group_size,
    )
    layer = GroupQuantizedLinear.from_quantized(whole)
    return {name: getattr(layer, name) for name in PACKED}


def joined(rows: Rows | None, parts: list[Tensor]) -> Tensor:
    """Rows of canonical tensors in the order of the files' one."""
    return parts[0] if rows is None else rows.join(parts)
