"""Loading a dense checkpoint with the linears of its blocks frozen in 4 or 8 bits: the base of a QLoRA run.

Each tensor is read, rounded and forgotten: memory holds the quantized model, the dense rest and the largest tensor that
has to be rounded or cut. The output layer and the embeddings stay dense. Nothing is written anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.compress.frozen_linear import FrozenLinear, frozen_linears
from burnish.compress.int8_frozen import Int8Frozen
from burnish.compress.nf4 import BLOCK_SIZE, BlockFormat
from burnish.compress.nf4_linear import Nf4Linear
from burnish.errors import ConfigError
from burnish.models.decoder import Decoder
from burnish.models.linears import replace_linears, set_module
from burnish.models.loading import materialise, open_checkpoint, plan_reads, read_parts, scratch_for

BLOCK_PREFIX = "model.layers."
KINDS = ("nf4", "fp4", "int8")


@dataclass(frozen=True, kw_only=True)
class FrozenFormat:
    """How a base is frozen.

    Attributes:
        kind: "nf4", "fp4" or "int8".
        block_size: weights per scale; 4-bit kinds only.
        double: 4-bit kinds only: scales are quantized too.
    """

    kind: str = "nf4"
    block_size: int = BLOCK_SIZE
    double: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError("frozen format is not known", got=repr(self.kind), expected=", ".join(KINDS))
        if self.kind != "int8":
            BlockFormat(kind=self.kind, block_size=self.block_size, double=self.double)

    def to_dict(self) -> dict[str, Any]:
        """For a manifest or an adapter's file; `from_dict` reads it."""
        if self.kind == "int8":
            return {"kind": self.kind}
        return {"kind": self.kind, "block_size": self.block_size, "double": self.double}

    @classmethod
    def from_dict(cls, record: Any) -> FrozenFormat:
        """Raises ConfigError for what `to_dict` does not write."""
        known = {"kind": str, "block_size": int, "double": bool}
        if not isinstance(record, dict) or any(type(value) is not known.get(key) for key, value in record.items()):
            raise ConfigError("a record of a frozen format cannot be read", got=record, expected=", ".join(known))
        return cls(**record)

    def layer(self, linear: nn.Linear, *, device: torch.device) -> FrozenLinear:
        """An empty layer for the place of a linear."""
        shape, has_bias, dtype = (linear.in_features, linear.out_features), linear.bias is not None, linear.weight.dtype
        if self.kind == "int8":
            return Int8Frozen(*shape, bias=has_bias, device=device, dtype=dtype)
        block_format = BlockFormat(kind=self.kind, block_size=self.block_size, double=self.double)
        return Nf4Linear(*shape, bias=has_bias, block_format=block_format, device=device, dtype=dtype)


def format_of(layer: FrozenLinear) -> FrozenFormat:
    """How a layer is frozen."""
    if isinstance(layer, Nf4Linear):
        kept = layer.block_format
        return FrozenFormat(kind=kept.kind, block_size=kept.block_size, double=kept.double)
    return FrozenFormat(kind="int8")


def load_frozen(
    folder: Path,
    frozen_format: FrozenFormat,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
) -> Decoder:
    """Load a model folder with the linears of its blocks frozen in a small format.

    Args:
        dtype: of everything else.

    Raises:
        ConfigError: the model is quantized already.
        CheckpointError: the folder is corrupt.
        CompressionError: NaN or infinite weights.
    """
    decoder, reader, hf_config = open_checkpoint(folder, dtype=dtype, allow_pickle=allow_pickle)
    if hf_config.get("quantization_config") is not None:
        raise ConfigError(
            f"{folder} is quantized already",
            expected="a dense checkpoint",
            remedy='Use method "lora" on it, or start from the model it was made from.',
        )
    device = torch.device(device)
    plan = plan_reads(decoder, reader)
    _place(decoder, frozen_format, device=torch.device("meta"))
    direct = {name for name, placement in plan.items() if _is_direct(decoder, placement.targets, placement)}
    scratch = scratch_for(reader, [name for name in plan if name not in direct])
    with torch.no_grad():
        for hf_name, placement in plan.items():
            if hf_name in direct:
                target = placement.targets[0]
                materialise(decoder, target, device)
                reader.read_into(hf_name, decoder.get_parameter(target).data)
                continue
            for target, part in read_parts(reader, hf_name, placement, scratch).items():
                _fill(decoder, target, part, device)
    return decoder.eval()


def freeze_in_place(decoder: nn.Module, frozen_format: FrozenFormat) -> list[str]:
    """Freeze the linears of a decoder's blocks that are in memory, one by one; returns their names.

    Raises:
        ConfigError: there is none.
        CompressionError: NaN or infinite weights.
    """

    def match(name: str, linear: nn.Linear) -> FrozenLinear | None:
        if not name.startswith(BLOCK_PREFIX):
            return None
        layer = frozen_format.layer(linear, device=linear.weight.device)
        layer.quantize_(linear.weight, name=name)
        if layer.bias is not None:
            layer.bias.data.copy_(linear.bias.detach())
        return layer

    return replace_linears(decoder, match)


def dequantize_in_place(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[str]:
    """Put dense linears of the very same weights in the places of frozen ones, adapters kept; returns their names."""
    names = list(frozen_linears(model))
    dense: dict[FrozenLinear, nn.Linear] = {}
    # Several adapters may share one base: it stands under several names.
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, FrozenLinear):
            continue
        if layer not in dense:
            dense[layer] = _dense(layer, dtype)
        set_module(model, name, dense[layer])
    return names


def _dense(layer: FrozenLinear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.dequantized(dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return linear.train(layer.training)


def _place(decoder: Decoder, frozen_format: FrozenFormat, *, device: torch.device) -> None:
    replace_linears(
        decoder,
        lambda name, linear: frozen_format.layer(linear, device=device) if name.startswith(BLOCK_PREFIX) else None,
    )


def _is_direct(decoder: Decoder, targets: tuple[str, ...], placement: Any) -> bool:
    """Whether a tensor of the files is read straight into a parameter, with nothing to cut, turn or round."""
    name, _, leaf = targets[0].rpartition(".")
    rounded = leaf == "weight" and isinstance(decoder.get_submodule(name), FrozenLinear)
    return placement.rows is None and not placement.transposed and not rounded


def _fill(decoder: Decoder, target: str, part: Tensor, device: torch.device) -> None:
    name, _, leaf = target.rpartition(".")
    module = decoder.get_submodule(name)
    if leaf == "weight" and isinstance(module, FrozenLinear):
        for buffer, _ in list(module.named_buffers()):
            materialise(decoder, f"{name}.{buffer}", device)
        module.quantize_(part.to(device), name=name)
    else:
        materialise(decoder, target, device)
        getattr(module, leaf).data.copy_(part)
