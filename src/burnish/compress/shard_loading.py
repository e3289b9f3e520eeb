"""Loading one process's part of a model folder, dense or quantized: no other weight is read or held.

`survey` looks at the headers and says where the linears may be cut; `load_part` reads a part. Dense checkpoints can be
quantized while they are read: a linear whose inputs are cut agrees with its other parts on the scales of its rows, so
that all parts together are what one process would have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from burnish.compress.compressed_tensors_reading import CompressedTensorsReader, place_rows
from burnish.compress.foreign_readers import foreign_reader
from burnish.compress.gptq_format import LinearFormat, read_quantization_config
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.int8_linear import LARGEST, Int8Linear, rounded
from burnish.compress.optimise import OptimiseReport, check_quantize, tensor_bytes
from burnish.compress.optimised_layers import GROUP_SIZE, OUTPUT_LAYER, place_layers, place_tensor
from burnish.compress.quantized_weight import check_weight, group_width
from burnish.errors import CheckpointError, ConfigError
from burnish.models.checkpoint import TensorReader
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.families.registry import family_named
from burnish.models.linears import replace_linears
from burnish.models.loading import materialise, open_checkpoint
from burnish.models.saving import some_names
from burnish.models.shard_cut import CutUnits, ShardCut
from burnish.models.shard_decoder import empty_part
from burnish.models.shard_reading import PackedGroups, ShardReader, group_span, is_ordered
from burnish.models.weight_map import WeightMap

_WORD_BITS = 32
Agree = Callable[[Tensor], None]
"""Makes a tensor the largest, element by element, of those of all processes of the stage, in place."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a folder's headers say.

    Attributes:
        config: of the whole model.
        dtype: of what is not packed.
        packed: how linears are packed in the files, by canonical name; `stored` is what config.json says of them.
        quantize: "none", "int8" or "int4": what is done while reading.
        reason: why, in words.
    """

    folder: Path
    config: ModelConfig
    dtype: torch.dtype
    reader: TensorReader
    weight_map: WeightMap
    stored: Mapping[str, LinearFormat]
    packed: Mapping[str, PackedGroups]
    asked: str
    quantize: str
    reason: str

    @property
    def units(self) -> CutUnits:
        """Where the linears may be cut."""
        if self.quantize == "int4":
            why = f"4-bit weights are rounded in groups of {GROUP_SIZE} inputs"
            return CutUnits(heads=GROUP_SIZE, inner=GROUP_SIZE, why=why)
        bits = {kept.bits for kept in self.packed.values()}
        if not bits:
            return CutUnits()
        words = math.lcm(*[_WORD_BITS // math.gcd(each, _WORD_BITS) for each in bits])
        groups = math.lcm(words, *[kept.width for kept in self.packed.values()])
        # Cutting inside a group works; between groups nothing is held twice.
        inner = groups if self.config.intermediate_size // groups >= 16 else words
        named = " and ".join(map(str, sorted(bits)))
        return CutUnits(
            heads=words, keys=words, inner=inner, vocab=words, why=f"{named}-bit weights are packed in 32-bit words"
        )


@dataclass(frozen=True, kw_only=True)
class LoadedPart:
    """Attributes:
    decoder: one part, in eval mode.
    bytes_read: of weight files, for it.
    """

    decoder: Decoder
    report: OptimiseReport
    bytes_read: int


def survey(folder: Path, *, dtype: torch.dtype, quantize: str, allow_pickle: bool = False) -> Survey:
    """Look at a folder without reading its weights.

    Raises:
        ConfigError: the model is quantized already, and `quantize` asks for it again.
        CheckpointError: the folder is corrupt.
    """
    check_quantize(quantize)
    decoder, plain, hf_config = open_checkpoint(folder, dtype=dtype, allow_pickle=allow_pickle)
    reader, seen = foreign_reader(plain, hf_config)
    if quantize in ("int8", "int4") and hf_config.get("quantization_config") is not None:
        raise ConfigError(
            f"{folder} is quantized already", got=f"--quantize {quantize}", remedy="Leave --quantize out."
        )
    config = decoder.config
    weight_map = family_named(config.family).weight_map(config)
    if isinstance(reader, CompressedTensorsReader) and weight_map.hf_module(OUTPUT_LAYER).name in reader.rows:
        config = replace(config, tie_word_embeddings=False)
    stored = _stored_formats(reader, weight_map, config, seen)
    automatic = "whether int8 is good enough is not measured over several processes"
    return Survey(
        folder=folder,
        config=config,
        dtype=dtype,
        reader=reader,
        weight_map=weight_map,
        stored=stored,
        packed={name: _packed_groups(reader, weight_map, config, name, kept) for name, kept in stored.items()},
        asked=quantize,
        quantize="none" if quantize == "auto" else quantize,
        reason=automatic if quantize == "auto" else "as asked",
    )


def load_part(found: Survey, cut: ShardCut, *, device: torch.device, agree: Agree) -> LoadedPart:
    """Read one part into a decoder of its shape.

    Args:
        agree: see `Agree`; called by all processes of a stage, for the same linears in the same order.

    Raises:
        CheckpointError: tensors are missing, or not of the shapes that config.json implies.
        CompressionError: NaN or infinite weights, where they are quantized.
    """
    started = time.perf_counter()
    decoder = empty_part(found.config, cut, dtype=found.dtype)
    dense_bytes = tensor_bytes(decoder)
    if isinstance(found.reader, CompressedTensorsReader):
        decoder = place_rows(decoder, found.reader)
    if found.stored:
        _place_packed(decoder, found, cut)
    wanted = list(decoder.state_dict())
    if found.quantize != "none":
        place_layers(decoder, quantize=found.quantize)
    reader = ShardReader(found.reader, found.weight_map, cut, found.config, packed=found.packed)
    _check_complete(wanted, reader, found)
    rounding = found.quantize != "none"
    with torch.no_grad():
        for name in list(decoder.state_dict()):
            if rounding:
                _round(decoder, name, reader, found, cut, device=device, agree=agree)
            else:
                _fill(decoder, name, reader.read(name), device)
    _finish_packed(decoder, found, cut)
    report = OptimiseReport(
        asked=found.asked,
        quantize=found.quantize,
        reason=found.reason,
        bytes_before=dense_bytes,
        bytes_after=tensor_bytes(decoder),
        seconds=time.perf_counter() - started,
    )
    return LoadedPart(decoder=decoder.eval(), report=report, bytes_read=reader.bytes_read)


def _stored_formats(
    reader: TensorReader, weight_map: WeightMap, config: ModelConfig, hf_config: Mapping[str, Any]
) -> dict[str, LinearFormat]:
    """What config.json says of each linear that the files hold packed, by canonical name."""
    quantized = read_quantization_config(hf_config)
    if quantized is None:
        return {}
    formats: dict[str, LinearFormat] = {}
    for name in config.linear_shapes():
        module = weight_map.hf_module(name).name
        if f"{module}.qweight" not in reader.tensors:
            continue
        kept = quantized.format_of(module)
        if kept is None:
            raise CheckpointError(f"{reader.folder}: {module} is packed, but config.json says it is dense")
        formats[name] = kept
    if not formats:
        raise CheckpointError(
            f"{reader.folder}: config.json has a quantization_config, but no weight is packed",
            remedy="Remove quantization_config when the weights are dense",
        )
    return formats


def _packed_groups(
    reader: TensorReader, weight_map: WeightMap, config: ModelConfig, name: str, kept: LinearFormat
) -> PackedGroups:
    in_features = config.linear_shapes()[name][1]
    width = group_width(in_features, kept.group_size)
    order = f"{weight_map.hf_module(name).name}.g_idx"
    # Only where inputs are cut does their order matter: a file may hold any.
    cut_by_inputs = name.endswith(("o_proj", "down_proj"))
    ordered = not cut_by_inputs or order not in reader.tensors or is_ordered(reader.read(order), width)
    return PackedGroups(bits=kept.bits, width=width, ordered=ordered)


def _place_packed(decoder: Decoder, found: Survey, cut: ShardCut) -> None:
    """Put empty packed layers, on the meta device, in the places of the linears that the files hold packed."""
    shapes = found.config.linear_shapes()

    def match(name: str, linear: nn.Linear) -> nn.Module | None:
        kept = found.stored.get(name)
        if kept is None:
            return None
        module = found.weight_map.hf_module(name).name
        layer = GroupQuantizedLinear(
            linear.in_features,
            linear.out_features,
            bits=kept.bits,
            group_size=kept.group_size,
            bias=linear.bias is not None or f"{module}.bias" in found.reader.tensors,
            zero_offset=kept.zero_offset,
            device="meta",
            dtype=linear.weight.dtype,
        )
        ins = cut.spans(name, found.config)[1]
        if ins is not None:
            first, last = group_span(found.packed[name], ins, shapes[name][1])
            for buffer in ("scales", "qzeros"):
                held = getattr(layer, buffer)
                setattr(layer, buffer, held.new_empty(last - first, held.shape[1]))
        if f"{module}.g_idx" not in found.reader.tensors:
            layer.g_idx = None
        if layer.scales is not None:
            layer.scales = layer.scales.to(found.reader.info(f"{module}.scales").dtype)
        return layer

    replace_linears(decoder, match)


def _finish_packed(decoder: Decoder, found: Survey, cut: ShardCut) -> None:
    """Number the groups of a part from its own first one, and make the layers ready to run."""
    for name, layer in list(decoder.named_modules()):
        if not isinstance(layer, GroupQuantizedLinear):
            continue
        ins = cut.spans(name, found.config)[1]
        groups = found.packed.get(name)
        if ins is not None and groups is not None and layer.scales is not None:
            first, last = group_span(groups, ins, found.config.linear_shapes()[name][1])
            if groups.ordered:
                columns = torch.arange(*ins, device=layer.scales.device)
                layer.g_idx = (columns // groups.width - first).to(torch.int32)
            elif last - first > 1 and layer.g_idx is not None and int(layer.g_idx.max()) == 0:
                # A layer whose g_idx is all zero is taken for one that has none.
                layer.scales, layer.qzeros = layer.scales[:1].contiguous(), _first_group(layer)
        layer.prepare()
        layer.zero_offset = 1


def _first_group(layer: GroupQuantizedLinear) -> Tensor:
    assert layer.qzeros is not None
    return layer.qzeros[:1].contiguous()


def _check_complete(wanted: Sequence[str], reader: ShardReader, found: Survey) -> None:
    """The files hold every tensor that is wanted here, and no other one for what is here."""
    missing = sorted({found.weight_map.hf(name).name for name in wanted if not reader.has(name)})
    if missing:
        raise CheckpointError(f"{found.folder} lacks {some_names(missing)}")
    places = {*wanted, "lm_head.weight"}
    over = [name for name in reader.names() if name not in places]
    if over:
        raise CheckpointError(f"{found.folder} holds tensors that the model has no place for: {some_names(over)}")


def _fill(decoder: Decoder, name: str, part: Tensor, device: torch.device) -> None:
    parent, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(parent)
    held = getattr(module, leaf)
    if tuple(held.shape) != tuple(part.shape):
        raise CheckpointError(
            f"{name} has the wrong shape in the files", got=list(part.shape), expected=list(held.shape)
        )
    if part.dtype == held.dtype and part.device == device and part.is_contiguous():
        # As it was read: a copy would leave a hole of its size in the heap.
        if leaf in module._parameters:
            part = nn.Parameter(part, requires_grad=held.requires_grad)
        setattr(module, leaf, part)
        return
    materialise(decoder, name, device)
    getattr(module, leaf).data.copy_(part)


def _round(
    decoder: Decoder,
    name: str,
    reader: ShardReader,
    found: Survey,
    cut: ShardCut,
    *,
    device: torch.device,
    agree: Agree,
) -> None:
    """Fill what belongs to one tensor of the checkpoint; what a rounded layer has beside its weight comes with it."""
    parent, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(parent)
    if not isinstance(module, (Int8Linear, GroupQuantizedLinear)) or leaf == "bias":
        _fill(decoder, name, reader.read(name), device)
        return
    if leaf not in ("weight", "qweight"):
        return
    part = reader.read(f"{parent}.weight")
    if not isinstance(module, Int8Linear) or cut.spans(parent, found.config)[1] is None:
        place_tensor(decoder, f"{parent}.weight", part, device=device)
        return
    for buffer, _ in list(module.named_buffers()):
        materialise(decoder, f"{parent}.{buffer}", device)
    check_weight(part, parent)
    peak_O = part.abs().amax(dim=1).float()
    agree(peak_O)
    step_O = peak_O / LARGEST
    step_O = torch.where(step_O > 0, step_O, 1.0)
    module.weight.copy_(rounded(part.float() / step_O[:, None]).clamp_(-LARGEST, LARGEST))
    module.weight_scale.copy_(step_O)
