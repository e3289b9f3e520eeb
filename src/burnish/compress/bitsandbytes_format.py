"""Model folders as bitsandbytes through transformers saves them: NF4, FP4 and LLM.int8().

Dettmers et al., 2023, arXiv:2305.14314, and 2022, arXiv:2208.07339; the tensors are described in `foreign_readers`.
None of it needs text. LLM.int8() is about outliers of activations: the program that runs the folder keeps channels
beyond a threshold in 16 bits; the file holds plain rows of 8 bits. Linears that a family stores fused are rounded
fused, as bitsandbytes would, and GPT-2's are written (out, in), as transformers does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.compress.calibration import block_linears
from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import dense_tensors, joined
from burnish.compress.int8_linear import quantize_rows
from burnish.compress.nf4 import (
    LEVELS,
    SCALES_PER_BLOCK,
    BlockFormat,
    dequantize_blocks,
    dynamic_levels,
    quantize_blocks,
)
from burnish.compress.quantize import LayerError, OnLayer, QuantizeResult
from burnish.compress.relative_error import relative_error
from burnish.compress.rotation import rotate_model
from burnish.errors import CompressionError
from burnish.models.checkpoint_writing import MAX_SHARD_BYTES, pending, write_safetensors_folder
from burnish.models.decoder import Decoder
from burnish.models.families.registry import family_named
from burnish.models.loading import copy_companions, write_config

THRESHOLD = 6.0
"""Activations of larger magnitude stay in 16 bits (LLM.int8's default)."""


@dataclass(frozen=True, kw_only=True)
class Codes:
    """A model's linears as codes: the tensors of every linear of the files, by full name."""

    tensors: Mapping[str, Tensor]


@torch.no_grad()
def quantize_codes(
    model: Decoder, config: QuantizeConfig, *, on_layer: OnLayer | None = None
) -> tuple[QuantizeResult, Codes]:
    """Round every linear of every block as bitsandbytes does; the model gets the weights that the codes stand for.

    Args:
        model: changed in place; stays dense.
        config: of method "nf4", "fp4" or "llm.int8".
        on_layer: called after each linear with its name, its error |W - Q| / |W| and its seconds.

    Raises:
        CompressionError: nothing to quantize; NaN or infinite weights (names the layer).
    """
    names = [
        f"model.layers.{layer}.{name}.weight"
        for layer, block in enumerate(model.model.layers)
        for name in block_linears(block)
    ]
    if not names:
        raise CompressionError(
            "the model has no dense linears in its blocks", remedy="It is quantized already; start from its parent"
        )
    started = last = time.perf_counter()
    if config.rotate:
        rotate_model(model)
    weight_map = family_named(model.config.family).weight_map(model.config)
    tensors: dict[str, Tensor] = {}
    layers: list[LayerError] = []
    num_weights = stored_bytes = 0
    for hf_name, placement in weight_map.placements(names).items():
        weights = [model.get_parameter(target) for target in placement.targets]
        whole_OI = joined(placement.rows, [weight.detach() for weight in weights])
        named = placement.targets[0].removesuffix(".weight")
        stored, rounded_OI = _coded(whole_OI, config, named, model.dtype)
        tensors |= {hf_name.removesuffix("weight") + suffix: tensor for suffix, tensor in stored.items()}
        num_weights += whole_OI.numel()
        stored_bytes += sum(tensor.nbytes for tensor in stored.values())
        parts = [rounded_OI] if placement.rows is None else placement.rows.split(rounded_OI)
        for target, weight, part_OI in zip(placement.targets, weights, parts):
            now = time.perf_counter()
            error = relative_error(weight, part_OI, None)
            layers.append(LayerError(name=target.removesuffix(".weight"), error=error, seconds=now - last))
            last = now
            weight.copy_(part_OI)
            if on_layer is not None:
                on_layer(layers[-1].name, error, layers[-1].seconds)
    result = QuantizeResult(
        config=config,
        layers=tuple(layers),
        bits_per_weight=8.0 * stored_bytes / num_weights,
        num_weights=num_weights,
        calibration_tokens=0,
        seconds=time.perf_counter() - started,
    )
    return result, Codes(tensors=tensors)


def save_codes(
    decoder: Decoder,
    codes: Codes,
    folder: str | Path,
    *,
    source: Path | None,
    config: QuantizeConfig,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model whose linears are codes as a folder of bitsandbytes.

    Args:
        decoder: gives everything else.
        source: the parent's folder: its config.json is kept where it says the same, its companions are copied.

    Raises:
        CheckpointError: writing fails.
        CapacityError: the disk is full.
    """
    folder = Path(folder)
    tensors = dense_tensors(decoder) | {name: pending(tensor) for name, tensor in codes.tensors.items()}
    write_safetensors_folder(folder, tensors, max_shard_bytes=max_shard_bytes)
    head = family_named(decoder.config.family).weight_map(decoder.config).hf_module("lm_head").name
    write_config(
        folder,
        decoder.config,
        source=source,
        dtype=decoder.dtype,
        changes={"quantization_config": quantization_record(config, decoder.dtype, head)},
    )
    if source is not None:
        copy_companions(source, folder)


def quantization_record(config: QuantizeConfig, dtype: torch.dtype, head: str) -> dict[str, Any]:
    """What config.json says, as transformers writes it."""
    four_bits = config.method != "llm.int8"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": four_bits,
        "load_in_8bit": not four_bits,
        "bnb_4bit_compute_dtype": _name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": config.method if four_bits else "fp4",
        "bnb_4bit_use_double_quant": four_bits and config.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(dict.fromkeys([head, "lm_head"])),
        "llm_int8_threshold": THRESHOLD,
    }


def _coded(
    weight_OI: Tensor, config: QuantizeConfig, name: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of one linear by suffix, and what they stand for, (out, in) float32."""
    rounded_OI = torch.empty(weight_OI.shape, dtype=torch.float32)
    weight_OI = weight_OI.cpu()
    if config.method == "llm.int8":
        ints_OI = torch.empty(weight_OI.shape, dtype=torch.int8)
        scale_O = torch.empty(weight_OI.shape[0], dtype=torch.float32)
        quantize_rows(weight_OI, ints_OI, scale_O, name=name)
        peak_O = scale_O * 127
        torch.mul(ints_OI, (peak_O / 127)[:, None], out=rounded_OI)
        return {"weight": ints_OI, "SCB": peak_O, "weight_format": torch.tensor(0, dtype=torch.uint8)}, rounded_OI
    block_format = BlockFormat(kind=config.method, block_size=config.group_size, double=config.double_quant)
    packed_P = torch.empty(-(-weight_OI.numel() // 2), dtype=torch.uint8)
    scales = quantize_blocks(weight_OI, block_format, packed_P, name=name)
    state: dict[str, Any] = {
        "quant_type": config.method,
        "blocksize": config.group_size,
        "dtype": _name(dtype),
        "shape": list(weight_OI.shape),
    }
    stored = {
        "weight": packed_P[:, None],
        "weight.absmax": scales.absmax,
        "weight.quant_map": torch.tensor(LEVELS[config.method], dtype=torch.float32),
    }
    if scales.scale is not None and scales.offset is not None:
        state |= {
            "nested_blocksize": SCALES_PER_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(scales.offset),
        }
        stored |= {
            "weight.nested_absmax": scales.scale,
            "weight.nested_quant_map": dynamic_levels(torch.device("cpu")),
        }
    record = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    stored[f"weight.quant_state.bitsandbytes__{config.method}"] = record
    return stored, dequantize_blocks(packed_P, scales, block_format, rounded_OI)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
