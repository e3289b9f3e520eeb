"""Which layer takes a dense linear's place in an optimised model, and how it is filled.

"int8": `Int8Linear` everywhere. "int4": `GroupQuantizedLinear` inside the blocks, `Int8Linear` for the output layer,
whose rounding shows most. A tied output layer is the embedding and stays dense.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.group_rounding import BITS, round_groups
from burnish.compress.int8_linear import Int8Linear, quantize_rows
from burnish.errors import ConfigError
from burnish.models.decoder import Decoder
from burnish.models.linears import replace_linears
from burnish.models.loading import materialise

GROUP_SIZE = 64
"""Input features per scale of 4-bit weights: 4.3 bits per weight, scales and zero points counted."""
OUTPUT_LAYER = "lm_head"


def place_layers(decoder: Decoder, *, quantize: str, group_size: int = GROUP_SIZE) -> None:
    """Put empty quantized layers, on the meta device, in the places of a decoder's linears."""
    replace_linears(
        decoder, lambda name, linear: _empty_layer(name, linear, quantize, group_size, torch.device("meta"))
    )


def place_tensor(decoder: Decoder, target: str, tensor: Tensor, *, device: torch.device) -> None:
    """Take one dense tensor of the checkpoint into a decoder with `place_layers` done, rounding what is quantized.

    Args:
        target: its canonical name.
        tensor: not kept; any dtype.

    Raises:
        CompressionError: NaN or infinite weights.
    """
    name, _, leaf = target.rpartition(".")
    module = decoder.get_submodule(name)
    if leaf == "weight" and isinstance(module, (Int8Linear, GroupQuantizedLinear)):
        for buffer, _ in list(module.named_buffers()):
            materialise(decoder, f"{name}.{buffer}", device)
        _round(tensor, module, name)
    else:
        materialise(decoder, target, device)
        getattr(module, leaf).data.copy_(tensor)


def quantize_in_place(decoder: Decoder, *, quantize: str, group_size: int = GROUP_SIZE) -> list[str]:
    """Quantize a decoder that is in memory, linears under adapters included; returns the names of those replaced.

    Raises:
        ConfigError: nothing is left to quantize, or `quantize` is neither "int8" nor "int4".
        CompressionError: NaN or infinite weights.
    """
    if quantize not in ("int8", "int4"):
        raise ConfigError("quantize is not known", got=quantize, expected="int8 or int4")

    def match(name: str, linear: nn.Linear) -> nn.Module:
        layer = _empty_layer(name, linear, quantize, group_size, linear.weight.device)
        _round(linear.weight.detach(), layer, name)
        if layer.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
        return layer

    return replace_linears(decoder, match)


def _empty_layer(
    name: str, linear: nn.Linear, quantize: str, group_size: int, device: torch.device
) -> Int8Linear | GroupQuantizedLinear:
    has_bias, dtype = linear.bias is not None, linear.weight.dtype
    if quantize == "int8" or name.split(".")[0] == OUTPUT_LAYER:
        return Int8Linear(linear.in_features, linear.out_features, bias=has_bias, device=device, dtype=dtype)
    layer = GroupQuantizedLinear(
        linear.in_features,
        linear.out_features,
        bits=BITS,
        group_size=group_size,
        bias=has_bias,
        device=device,
        dtype=dtype,
    )
    layer.g_idx = None  # groups in plain order
    return layer


def _round(weight_OI: Tensor, layer: Int8Linear | GroupQuantizedLinear, name: str) -> None:
    if isinstance(layer, Int8Linear):
        quantize_rows(weight_OI, layer.weight, layer.weight_scale, name=name)
    else:
        round_groups(weight_OI, layer, name=name)
