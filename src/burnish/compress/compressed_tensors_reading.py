"""Reading folders in the compressed-tensors layout, see `compressed_tensors` for what they hold.

Linears whose activations are rounded to 8 bits become `Int8Linear`: token by token, also where the folder says static
activation scales. Packed ones, and 8-bit ones with dense activations, are shown as GPTQ's second version and stay
packed. An embedding in 8 bits is rebuilt once while it is read; where it is the output layer too, that becomes a layer
of its own, of the same integers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from burnish.compress.compressed_tensors import EMBEDDING, OUTPUT_LAYER, PACKED_FORMAT, ROWS_FORMAT, words_of_middle
from burnish.compress.config import PER_CHANNEL
from burnish.compress.converting_reader import ConvertingReader
from burnish.compress.gptq_format import check_divides
from burnish.compress.int8_linear import Int8Linear
from burnish.compress.packing import WORD_BITS, num_words, pack
from burnish.errors import CheckpointError
from burnish.models.checkpoint import TensorInfo, TensorReader
from burnish.models.decoder import Decoder
from burnish.models.families.registry import family_named
from burnish.models.hf_config import config_of
from burnish.models.linears import replace_linears

_SUFFIXES = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *("input_scale", "input_zero_point"),
)
_CLASSES = ("Linear", "Embedding")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the linears of one group are stored.

    Attributes:
        targets: names of modules of the files, "re:" and a regular expression, or names of classes.
        bits: of the weights.
        group_size: -1 for one scale per output feature, or per matrix.
        symmetric: no zero points are stored.
        activations: rounded to 8 bits.
    """

    targets: tuple[str, ...]
    bits: int
    group_size: int
    symmetric: bool
    activations: bool

    def names(self, module: str) -> bool:
        """Whether a target names this module itself, not its class."""
        return any(
            re.match(target.removeprefix("re:"), module) is not None if target.startswith("re:") else target == module
            for target in self.targets
        )


def read_schemes(record: Mapping[str, Any]) -> list[Scheme]:
    """The groups of a quantization_config.

    Raises:
        CheckpointError: one of them is of a kind that cannot be read.
    """
    groups = record.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise CheckpointError("config.json's quantization_config has no config_groups")
    schemes = []
    for name, group in groups.items():
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        found = group.get("format") or record.get("format")
        strategy = weights.get("strategy") or ("group" if (weights.get("group_size") or 0) > 0 else "channel")
        bits, size = weights.get("num_bits", 8), weights.get("group_size")
        readable = (
            found in (PACKED_FORMAT, ROWS_FORMAT, "naive-quantized", "mixed-precision")
            and weights.get("type", "int") == "int"
            and bits in (2, 4, 8)
            and strategy in ("channel", "tensor", "group")
            and (strategy != "group" or (isinstance(size, int) and size > 0))
            and (inputs is None or (inputs.get("type", "int") == "int" and inputs.get("num_bits") == 8))
        )
        if not readable:
            raise CheckpointError(
                f"config.json's {name} is quantized in a way that cannot be read",
                got=f"format {found!r}, weights {weights.get('type')} of {bits} bits by {strategy}",
                expected=f"{PACKED_FORMAT} or {ROWS_FORMAT}, integers of 2, 4 or 8 bits by channel or group",
                remedy="Use --engine transformers",
            )
        schemes.append(
            Scheme(
                targets=tuple(group.get("targets") or ()),
                bits=bits,
                group_size=int(size or 0) if strategy == "group" else PER_CHANNEL,
                symmetric=weights.get("symmetric", True),
                activations=inputs is not None,
            )
        )
    return schemes


class CompressedTensorsReader(ConvertingReader):
    """A compressed-tensors folder: packed linears as GPTQ's second version, 8-bit ones as `Int8Linear` has them.

    Args:
        reader: of the folder.
        hf_config: its config.json.

    Attributes:
        rows: modules of the files that are to be `Int8Linear`.
        seen_config: config.json as the loader of packed linears is to see it.

    Raises:
        CheckpointError: a scheme cannot be read, or a tensor is not as it says.
    """

    def __init__(self, reader: TensorReader, hf_config: Mapping[str, Any]) -> None:
        super().__init__(reader)
        config = config_of(hf_config)
        self._weight_map = family_named(config.family).weight_map(config)
        self._schemes = read_schemes(hf_config["quantization_config"])
        self._made: dict[str, Callable[[], Tensor]] = {}
        self.rows: set[str] = set()
        packed: dict[str, Scheme] = {}
        hidden: set[str] = set()
        for name in reader.names():
            module, _, suffix = name.rpartition(".")
            if suffix not in ("weight_packed", "weight_scale"):
                continue
            hidden.update(f"{module}.{each}" for each in _SUFFIXES)
            if suffix == "weight_packed":
                packed[module] = self._scheme_of(module)
                self._show_packed(module, packed[module])
            elif f"{module}.weight" in reader.tensors:
                self._show_rows(module, packed, tied=config.tie_word_embeddings)
        if not packed and not self.rows:
            raise CheckpointError(f"{reader.folder}: config.json says compressed-tensors, but no weight is quantized")
        self.tensors |= {name: info for name, info in reader.tensors.items() if name not in hidden}
        self.seen_config = _as_gptq(hf_config, packed)

    def make(self, name: str) -> Tensor:
        """See `ConvertingReader.make`."""
        return self._made[name]()

    def read_into(self, name: str, destination: Tensor) -> None:
        """See `TensorReader.read_into`; tensors are converted even where dtype and shape stay."""
        if name in self._made:
            destination.copy_(self.make(name))
            return
        super().read_into(name, destination)

    def _scheme_of(self, module: str) -> Scheme:
        """A scheme that names the module, else one that names its class."""
        named = [scheme for scheme in self._schemes if scheme.names(module)]
        classes = [scheme for scheme in self._schemes if any(target in _CLASSES for target in scheme.targets)]
        if not named and not classes:
            raise CheckpointError(f"{self.folder}: {module} is quantized, but no group of config.json names it")
        return (named or classes)[0]

    def _show_made(self, name: str, like: str, dtype: torch.dtype, make: Callable[[], Tensor], *shape: int) -> None:
        info = self._source.info(like)
        self.tensors[name] = TensorInfo(name, dtype, shape, info.path, info.start)
        self._made[name] = make

    def _scales(self, module: str, rows: int) -> Tensor:
        """(out, groups); one of a whole matrix stands for all its rows."""
        scales = self._source.read(f"{module}.weight_scale")
        if scales.numel() == 1:
            scales = scales.reshape(1, 1).expand(rows, 1)
        if scales.dim() != 2 or scales.shape[0] != rows:
            raise CheckpointError(
                f"{self._source.info(f'{module}.weight_scale').path}: {module}.weight_scale has the wrong shape",
                got=list(scales.shape),
                expected=f"{rows} rows",
            )
        return scales

    def _show_rows(self, module: str, packed: dict[str, Scheme], *, tied: bool) -> None:
        """8-bit weights that fill a byte each."""
        weight = f"{module}.weight"
        info = self._source.info(weight)
        scheme = self._scheme_of(module)
        if info.dtype != torch.int8 or len(info.shape) != 2 or not scheme.symmetric or scheme.group_size != PER_CHANNEL:
            raise CheckpointError(
                f"{info.path}: {weight} is quantized in a way that cannot be read",
                got=f"{str(info.dtype).removeprefix('torch.')} of shape {list(info.shape)}",
                expected="int8 with a scale per output feature and no zero points",
                remedy="Use --engine transformers",
            )
        rows, columns = info.shape
        scales_OG = partial(self._scales, module, rows)
        placement = self._weight_map.canonical(weight)
        if placement is not None and placement.targets == (f"{EMBEDDING}.weight",):
            self._show_made(
                weight, weight, torch.float32, lambda: self._source.read(weight).float() * scales_OG(), rows, columns
            )
            head = self._weight_map.hf_module(OUTPUT_LAYER).name
            if tied and f"{head}.weight" not in self._source.tensors:
                self._show_int8(head, weight, scales_OG, rows, columns)
        elif scheme.activations:
            transposed = placement is not None and placement.transposed
            self._show_int8(module, weight, scales_OG, rows, columns, transposed=transposed)
        else:
            packed[module] = replace(scheme, bits=8)
            self._show_group(
                module,
                packed[module],
                weight,
                rows,
                columns,
                lambda: pack(self._source.read(weight).t().short() + 128, 8),
            )

    def _show_int8(
        self,
        module: str,
        weight: str,
        scales_OG: Callable[[], Tensor],
        rows: int,
        columns: int,
        *,
        transposed: bool = False,
    ) -> None:
        self.rows.add(module)
        # The family's files hold this weight (in, out), and the loader turns it round.
        shape = (columns, rows) if transposed else (rows, columns)
        self._show_made(
            f"{module}.weight",
            weight,
            torch.int8,
            lambda: self._source.read(weight).t() if transposed else self._source.read(weight),
            *shape,
        )
        self._show_made(f"{module}.weight_scale", weight, torch.float32, lambda: scales_OG()[:, 0].float(), rows)

    def _show_packed(self, module: str, scheme: Scheme) -> None:
        """Words of several integers."""
        name = f"{module}.weight_packed"
        info = self._source.info(name)
        shape = self._source.read(f"{module}.weight_shape").tolist()
        if info.dtype != torch.int32 or list(info.shape) != [shape[0], num_words(shape[-1], scheme.bits)]:
            raise CheckpointError(
                f"{info.path}: {name} does not hold {scheme.bits}-bit weights of shape {shape}", got=list(info.shape)
            )
        rows, columns = shape
        self._show_group(module, scheme, name, rows, columns, lambda: self._source.read(name).t())

    def _show_group(
        self, module: str, scheme: Scheme, like: str, rows: int, columns: int, words: Callable[[], Tensor]
    ) -> None:
        """A linear as GPTQ's second version holds it."""
        bits = scheme.bits
        self._show_made(f"{module}.qweight", like, torch.int32, words, num_words(columns, bits), rows)
        scales_OG = self._scales(module, rows)
        groups = scales_OG.shape[1]
        # Kernels take float16, which most scales of 16 bits are exactly.
        halved = torch.float16 if torch.equal(scales_OG.half().to(scales_OG.dtype), scales_OG) else scales_OG.dtype
        del scales_OG
        self._show_made(
            f"{module}.scales", like, halved, lambda: self._scales(module, rows).t().to(halved), groups, rows
        )

        placement = self._weight_map.canonical(f"{module}.qweight")
        fused = None if placement is None else placement.rows
        if scheme.symmetric:
            count = words_of_middle(module, fused, rows, bits)
            middle = pack(torch.full((WORD_BITS, 1), 1 << (bits - 1), dtype=torch.uint8), bits)
            self._show_made(
                f"{module}.qzeros",
                like,
                torch.int32,
                lambda: middle.flatten().repeat(-(-count // bits))[:count].expand(groups, count),
                *(groups, count),
            )
        else:
            check_divides(module, fused, bits)
            self._show_made(
                f"{module}.qzeros",
                like,
                torch.int32,
                lambda: self._source.read(f"{module}.weight_zero_point").t(),
                *(groups, num_words(rows, bits)),
            )
        if f"{module}.weight_g_idx" in self._source.tensors:
            self._show_made(
                f"{module}.g_idx", like, torch.int32, lambda: self._source.read(f"{module}.weight_g_idx"), columns
            )


def _as_gptq(hf_config: Mapping[str, Any], packed: Mapping[str, Scheme]) -> dict[str, Any]:
    """config.json for the loader of packed linears."""
    seen = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    if not packed:
        return seen
    first = next(iter(packed.values()))
    record = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": first.bits,
        "group_size": first.group_size,
    }
    others = {
        f"+:^{re.escape(module)}$": {"bits": scheme.bits, "group_size": scheme.group_size}
        for module, scheme in packed.items()
        if (scheme.bits, scheme.group_size) != (first.bits, first.group_size)
    }
    return {**seen, "quantization_config": {**record, "dynamic": others}}


def place_rows(decoder: Decoder, reader: CompressedTensorsReader) -> Decoder:
    """Put an `Int8Linear`, on the meta device, in the place of every linear that the files hold in 8-bit rows.

    Returns:
        The decoder, or a new one whose output layer is no longer the embedding.
    """
    weight_map = family_named(decoder.config.family).weight_map(decoder.config)
    names = {
        target.removesuffix(".weight_scale")
        for module in reader.rows
        if (placement := weight_map.canonical(f"{module}.weight_scale")) is not None
        for target in placement.targets
    }
    if not names:
        return decoder
    if OUTPUT_LAYER in names and decoder.lm_head is None:
        untied = replace(decoder.config, tie_word_embeddings=False)
        decoder = Decoder(untied, device="meta", dtype=decoder.dtype).eval()

    def match(name: str, linear: nn.Linear) -> nn.Module | None:
        if name not in names:
            return None
        return Int8Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device="meta",
            dtype=linear.weight.dtype,
        )

    replace_linears(decoder, match)
    return decoder
