"""Model folders in the compressed-tensors layout: what llm-compressor writes, and vLLM and transformers load.

config.json's quantization_config names schemes for groups of linears; per linear the files hold, with `format`

    int-quantized    weight (out, in) int8, weight_scale (out, 1)
    pack-quantized   weight_packed (out, ceil(in * bits / 32)) int32, weight_scale (out, groups), weight_shape (2,)
                     int64; asymmetric: weight_zero_point (ceil(out * bits / 32), groups) int32

Integers are signed; packed ones are stored with 2^(bits - 1) added, the first input in the lowest bits, without gaps.
W8A8 is int-quantized with activations of 8 bits per token, `Int8Linear`'s arithmetic but for the range: the reference
library divides a token's largest magnitude by 127.5. Reading is in `compressed_tensors_reading`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.compress.config import PER_CHANNEL, QuantizeConfig
from burnish.compress.gptq_format import check_divides, dense_tensors, joined
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.int8_linear import Int8Linear, quantize_rows
from burnish.compress.packing import num_words, pack
from burnish.errors import CompressionError
from burnish.models.checkpoint_writing import MAX_SHARD_BYTES, PendingTensor, write_safetensors_folder
from burnish.models.decoder import Decoder
from burnish.models.families.registry import family_named
from burnish.models.loading import copy_companions, write_config
from burnish.models.weight_map import Placement, Rows, WeightMap

ROWS_FORMAT, PACKED_FORMAT = "int-quantized", "pack-quantized"
EMBEDDING, OUTPUT_LAYER = "model.embed_tokens", "lm_head"


def save_compressed_tensors(
    decoder: Decoder,
    folder: str | Path,
    *,
    source: Path | None,
    config: QuantizeConfig,
    widths: Mapping[str, int] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a quantized decoder as a model folder in the compressed-tensors layout.

    GPT-2's linears are written (out, in) like all others, which no other program has a place for.

    Args:
        decoder: its linears are `Int8Linear` or `GroupQuantizedLinear`; not changed.
        source: the parent's folder: its config.json is kept where it says the same, its companions are copied.
        config: what the decoder was quantized with; with `embeddings` the embedding is rounded here.
        widths: bits of linears by canonical name, where they are not the config's.

    Raises:
        CompressionError: nothing is quantized, columns are not in plain order, or NaN or infinite embeddings.
        CheckpointError: writing fails.
        CapacityError: the disk is full.
    """
    folder = Path(folder)
    weight_map = family_named(decoder.config.family).weight_map(decoder.config)
    layers = {name: module for name, module in decoder.named_modules() if isinstance(module, _KINDS)}
    if not layers:
        raise CompressionError("the model has no quantized linears to save", remedy="Quantize it first")
    tensors = dense_tensors(decoder)
    placements = weight_map.placements([f"{name}.weight_scale" for name in layers])
    for hf_name, placement in placements.items():
        module = hf_name.removesuffix(".weight_scale")
        parts = [layers[target.removesuffix(".weight_scale")] for target in placement.targets]
        stored = _stored(module, placement, parts, symmetric=config.symmetric)
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in stored.items()}
    if config.embeddings:
        embedding = weight_map.hf_module(EMBEDDING).name
        del tensors[f"{embedding}.weight"]
        rows = _embedding_rows(decoder.model.embed_tokens.weight.detach())
        tensors |= {f"{embedding}.{suffix}": tensor for suffix, tensor in rows.items()}
        if decoder.lm_head is None:
            # Programs that tie the two give the output layer the integers, not the scales.
            tensors[f"{weight_map.hf_module(OUTPUT_LAYER).name}.weight_scale"] = rows["weight_scale"]
    write_safetensors_folder(folder, tensors, max_shard_bytes=max_shard_bytes)
    record = quantization_record(decoder, weight_map, config, widths or {})
    write_config(folder, decoder.config, source=source, dtype=decoder.dtype, changes={"quantization_config": record})
    if source is not None:
        copy_companions(source, folder)


_KINDS = (Int8Linear, GroupQuantizedLinear)


def quantization_record(
    decoder: Decoder, weight_map: WeightMap, config: QuantizeConfig, widths: Mapping[str, int]
) -> dict[str, Any]:
    """What config.json says of a model quantized with `config`, as the reference library writes it."""
    by_bits: dict[int, list[str]] = {}
    for name, bits in widths.items():
        if bits != config.bits:
            module = weight_map.hf_module(name).name
            by_bits.setdefault(bits, [])
            if module not in by_bits[bits]:
                by_bits[bits].append(module)
    in_rows = any(isinstance(module, Int8Linear) for module in decoder.model.modules())
    schemes = [_packed_scheme(config, bits, targets) for bits, targets in sorted(by_bits.items())]
    # transformers calls every family's output layer lm_head, whatever its files do.
    heads = list(dict.fromkeys([weight_map.hf_module(OUTPUT_LAYER).name, "lm_head"]))
    if config.embeddings:
        schemes.append(_rows_scheme([weight_map.hf_module(EMBEDDING).name], activations=False))
        if not in_rows:
            schemes.append(_rows_scheme(heads))
    schemes.append(_rows_scheme(["Linear"]) if in_rows else _packed_scheme(config, config.bits, ["Linear"]))
    formats = {scheme["format"] for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(formats) > 1 else formats.pop(),
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": scheme for number, scheme in enumerate(schemes)},
        "ignore": [] if config.embeddings else heads,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _rows_scheme(targets: list[str], *, activations: bool = True) -> dict[str, Any]:
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "targets": targets,
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True} if activations else None,
        "output_activations": None,
        "format": ROWS_FORMAT,
    }


def _packed_scheme(config: QuantizeConfig, bits: int, targets: list[str]) -> dict[str, Any]:
    whole_rows = config.group_size == PER_CHANNEL
    return {
        "targets": targets,
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": config.symmetric,
            "strategy": "channel" if whole_rows else "group",
            "group_size": None if whole_rows else config.group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": PACKED_FORMAT,
    }


def _stored(
    module: str, placement: Placement, parts: list[Int8Linear | GroupQuantizedLinear], *, symmetric: bool
) -> dict[str, PendingTensor]:
    """The tensors of one linear of the files, by suffix, made when their turn to be written comes."""
    out_features, in_features = sum(part.out_features for part in parts), parts[0].in_features
    rows = [part for part in parts if isinstance(part, Int8Linear)]
    if len(rows) == len(parts):
        return {
            "weight": PendingTensor(
                (out_features, in_features),
                torch.int8,
                lambda: joined(placement.rows, [part.weight for part in rows]),
            ),
            "weight_scale": PendingTensor(
                (out_features, 1),
                torch.float32,
                lambda: joined(placement.rows, [part.weight_scale[:, None] for part in rows]),
            ),
        }
    groups = [part for part in parts if isinstance(part, GroupQuantizedLinear)]
    if len(groups) != len(parts) or len({part.bits for part in groups}) > 1:
        raise CompressionError(f"the parts of {module} are quantized in different ways")
    first = groups[0]
    columns_I = first.groups_of_columns()
    if bool((columns_I.diff() < 0).any()):
        raise CompressionError(
            f"{module} has its columns in groups of another order", remedy="Quantize without activation_order"
        )
    if symmetric:
        words_of_middle(module, placement.rows, out_features, first.bits)
    else:
        check_divides(module, placement.rows, first.bits)
    num_groups = int(columns_I[-1]) + 1
    make = _Packing(module, placement, groups, symmetric=symmetric)
    shapes = {
        "weight_packed": ((out_features, num_words(in_features, first.bits)), torch.int32),
        "weight_scale": ((out_features, num_groups), first.scales_dtype),
        "weight_shape": ((2,), torch.int64),
    }
    if not symmetric:
        shapes["weight_zero_point"] = ((num_words(out_features, first.bits), num_groups), torch.int32)
    return {suffix: PendingTensor(shape, dtype, partial(make, suffix)) for suffix, (shape, dtype) in shapes.items()}


def words_of_middle(module: str, rows: Rows | None, out_features: int, bits: int) -> int:
    """Words of one group's zero points, of which a symmetric layout stores none, cut as the parts of `rows` are.

    Raises:
        CheckpointError: they cannot be cut.
    """
    if rows is None:
        return num_words(out_features, bits)
    words = sum(num_words(rows.rows_of(part), bits) for part in range(rows.num_parts))
    uneven = any(
        rows.rows_of(part) * words != num_words(rows.rows_of(part), bits) * rows.num_rows
        for part in range(rows.num_parts)
    )
    if uneven or any(count * words % rows.num_rows for _, count in rows.blocks):
        check_divides(module, rows, bits)
    return words


class _Packing:
    """Packs one linear of the files once, and lets go of it when its last tensor is taken."""

    def __init__(
        self, module: str, placement: Placement, parts: list[GroupQuantizedLinear], *, symmetric: bool
    ) -> None:
        self._module, self._rows, self._parts, self._symmetric = module, placement.rows, parts, symmetric
        self._made: dict[str, Tensor] = {}

    def __call__(self, suffix: str) -> Tensor:
        if suffix not in self._made:
            self._made = self._pack()
        return self._made.pop(suffix)

    def _pack(self) -> dict[str, Tensor]:
        wholes = [part.quantized() for part in self._parts]
        bits = wholes[0].bits
        ints_OI = joined(self._rows, [whole.ints for whole in wholes])
        zeros_OG = joined(self._rows, [whole.zeros for whole in wholes])
        if self._symmetric and bool((zeros_OG != 1 << (bits - 1)).any()):
            raise CompressionError(f"{self._module} has zero points, which a symmetric layout has no place for")
        made = {
            "weight_packed": pack(ints_OI.t(), bits).t(),
            "weight_scale": joined(self._rows, [whole.scales for whole in wholes]),
            "weight_shape": torch.tensor(ints_OI.shape),
        }
        return made if self._symmetric else made | {"weight_zero_point": pack(zeros_OG, bits)}


def _embedding_rows(weight_VD: Tensor) -> dict[str, PendingTensor]:
    """The embedding in 8 bits per row, rounded now."""
    ints_VD = torch.empty(weight_VD.shape, dtype=torch.int8)
    scale_V = torch.empty(weight_VD.shape[0], dtype=torch.float32)
    quantize_rows(weight_VD.cpu(), ints_VD, scale_V, name=EMBEDDING)
    return {
        "weight": PendingTensor(tuple(ints_VD.shape), torch.int8, lambda: ints_VD),
        "weight_scale": PendingTensor((len(scale_V), 1), torch.float32, lambda: scale_V[:, None]),
    }
