"""The loader for everything that runs or measures a model: dense and quantized folders alike."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from burnish.compress.compressed_tensors_reading import CompressedTensorsReader, place_rows
from burnish.compress.foreign_readers import foreign_reader
from burnish.compress.gptq_format import GptqFolderConfig, LinearFormat, quantized_linears, read_quantization_config
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.packing import num_words
from burnish.errors import CheckpointError
from burnish.models.checkpoint import TensorReader
from burnish.models.decoder import Decoder
from burnish.models.families.registry import family_named
from burnish.models.linears import replace_linears
from burnish.models.loading import fill_decoder, open_checkpoint, resolve_model
from burnish.models.weight_map import WeightMap


def load_model(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
) -> Decoder:
    """Load a dense or quantized model folder, whoever wrote it.

    Quantized linears are those that the weight files hold packed; config.json says their bits and group size. Both
    versions of the layout, any order of groups (g_idx), overrides per module and missing g_idx are understood. AWQ
    folders become such linears too, and compressed-tensors ones `Int8Linear` where activations are rounded; what
    bitsandbytes quantized becomes dense (`foreign_readers`).

    Args:
        model: a folder, a bundled model's name or a hub id, as `models.loading.resolve_model` takes it.
        dtype: of what is not packed, and of the activations; "auto" takes config.json's.
        device: where the model goes.
        revision, offline, allow_pickle: as in `models.loading.load_decoder`.

    Returns:
        The decoder in eval mode, quantized linears ready to run.

    Raises:
        CheckpointError: the folder is corrupt, its quantization is of another kind, or its tensors are not the shapes
            that config.json implies; names file and key.
    """
    folder = resolve_model(model, revision=revision, offline=offline, allow_pickle=allow_pickle)

    decoder, plain_reader, hf_config = open_checkpoint(folder, dtype=dtype, allow_pickle=allow_pickle)
    reader, seen_config = foreign_reader(plain_reader, hf_config)
    if isinstance(reader, CompressedTensorsReader):
        decoder = place_rows(decoder, reader)
    config = read_quantization_config(seen_config)
    if config is not None:
        _place_quantized_linears(decoder, config, reader)
    fill_decoder(decoder, reader, device=torch.device(device))
    decoder.eval()
    for name, layer in quantized_linears(decoder).items():
        try:
            layer.prepare()
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder}: {name}: {error.what}", got=error.got, expected=error.expected, remedy=error.remedy
            ) from error
        layer.zero_offset = 1
    return decoder


def _place_quantized_linears(decoder: Decoder, config: GptqFolderConfig, reader: TensorReader) -> None:
    """Replace, on the meta device, every linear that the files hold packed."""
    weight_map = family_named(decoder.config.family).weight_map(decoder.config)
    names = set(reader.names())
    packed = _packed_modules(weight_map, names)
    if not packed:
        raise CheckpointError(
            f"{reader.folder}: config.json has a quantization_config, but no weight is packed",
            remedy="Remove quantization_config when the weights are dense",
        )

    def match(name: str, linear: nn.Linear) -> nn.Module | None:
        hf_module = packed.get(name)
        if hf_module is None:
            return None
        stored = config.format_of(hf_module)
        if stored is None:
            raise CheckpointError(f"{reader.folder}: {hf_module} is packed, but config.json says it is dense")
        _check_words(reader, hf_module, linear.in_features, stored)
        layer = GroupQuantizedLinear(
            linear.in_features,
            linear.out_features,
            bits=stored.bits,
            group_size=stored.group_size,
            # Some programs write a bias of zeros beside every packed linear, also where the architecture has none.
            bias=linear.bias is not None or f"{hf_module}.bias" in names,
            zero_offset=stored.zero_offset,
            device="meta",
            dtype=linear.weight.dtype,
        )
        if f"{hf_module}.g_idx" not in names:
            layer.g_idx = None
        if f"{hf_module}.scales" in names and layer.scales is not None:
            layer.scales = layer.scales.to(reader.info(f"{hf_module}.scales").dtype)
        return layer

    replace_linears(decoder, match)


def _packed_modules(weight_map: WeightMap, names: set[str]) -> dict[str, str]:
    """Canonical name of each packed linear, and the module of the files that holds it."""
    modules: dict[str, str] = {}
    for hf_name in names:
        if not hf_name.endswith(".qweight"):
            continue
        placement = weight_map.canonical(hf_name)
        for target in () if placement is None else placement.targets:
            modules[target.removesuffix(".qweight")] = hf_name.removesuffix(".qweight")
    return modules


def _check_words(reader: TensorReader, hf_module: str, in_features: int, stored: LinearFormat) -> None:
    """A wrong number of bits shows in qweight's rows: say so, rather than complain about shapes later."""
    info = reader.info(f"{hf_module}.qweight")
    expected = num_words(in_features, stored.bits)
    if info.shape[0] != expected:
        raise CheckpointError(
            f"{info.path}: {info.name} does not hold {stored.bits}-bit weights of {in_features} input features",
            got=f"{info.shape[0]} rows",
            expected=f"{expected} rows",
        )
