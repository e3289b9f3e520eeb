"""Reading one process's part of a model folder: tensors under their canonical names, cut while they are read.

The weight map says where a canonical tensor lies in the files, the cut which of its features are wanted; what is read
is just those bytes. Fused tensors are taken apart, transposed ones turned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.errors import CheckpointError
from burnish.models.checkpoint import TensorInfo, TensorReader
from burnish.models.config import ModelConfig
from burnish.models.saving import some_names
from burnish.models.shard_cut import ShardCut, Span, layer_of
from burnish.models.weight_map import Placement, Rows, WeightMap

_WORD_BITS = 32
_PACKED = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True, kw_only=True)
class PackedGroups:
    """How a linear in GPTQ's layout is packed.

    Attributes:
        bits: per weight.
        width: input features of a full group.
        ordered: groups are runs of input features; otherwise any feature may be of any group.
    """

    bits: int
    width: int
    ordered: bool


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a canonical tensor lies: which tensor of the files, and which part of it."""

    source: str
    placement: Placement
    part: int


class ShardReader:
    """The tensors of one part of a model.

    Args:
        reader: of the whole folder.
        weight_map: of the whole model's config, as `config` is.
        cut: what is wanted.
        packed: the linears that the files hold packed, by canonical name.

    Raises:
        CheckpointError: a tensor has no place in the model.

    Attributes:
        bytes_read: so far.
    """

    def __init__(
        self,
        reader: TensorReader,
        weight_map: WeightMap,
        cut: ShardCut,
        config: ModelConfig,
        *,
        packed: Mapping[str, PackedGroups],
    ) -> None:
        self.bytes_read = 0
        self._reader, self._cut, self._config, self._packed = reader, cut, config, packed
        self._places: dict[str, _Place] = {}
        shapes = config.linear_shapes()
        hidden = config.hidden_size
        self._features = {
            **shapes,
            "model.embed_tokens": (config.vocab_size, hidden),
            "model.embed_positions": (config.max_position_embeddings, hidden),
        }
        left_over = []
        for source in reader.names():
            placement = weight_map.canonical(source)
            if placement is None or layer_of(placement.targets[0]) >= config.num_layers:
                if not weight_map.is_ignored(source):
                    left_over.append(source)
                continue
            for part, target in enumerate(placement.targets):
                if target in self._places:
                    raise CheckpointError(
                        f"{reader.folder}: {source} and {self._places[target].source} are the same weight"
                    )
                self._places[target] = _Place(source=source, placement=placement, part=part)
        if left_over:
            raise CheckpointError(
                f"{reader.folder} holds tensors that the model has no place for: {some_names(left_over)}"
            )

    def has(self, name: str) -> bool:
        """Whether the files hold this canonical tensor."""
        return name in self._places

    def names(self) -> list[str]:
        """Canonical tensors of the files that are here, in part at least."""
        return [name for name in self._places if self._cut.holds(name)]

    def info(self, name: str) -> TensorInfo:
        """The file's tensor that holds this one."""
        return self._reader.info(self._places[name].source)

    def read(self, name: str) -> Tensor:
        """This part of a canonical tensor, in the file's dtype: (out, in) for a dense weight, else as the file has it.

        Raises:
            CheckpointError: the file's tensor is not of the model's shape, or a cut falls inside a packed word.
        """
        place = self._places[name]
        module, _, suffix = name.rpartition(".")
        info = self.info(name)
        outs, ins = self._cut.spans(module, self._config)
        self._check(name, info)
        out_runs = self._out_runs(name, info, outs)
        in_run = None if ins is None else [self._in_span(module, suffix, ins)]
        turned = place.placement.transposed or suffix in _PACKED
        if suffix == "g_idx":
            rows, columns = in_run, None
        elif turned:
            rows, columns = in_run, out_runs
        else:
            rows, columns = out_runs, in_run if len(info.shape) > 1 else None
        every = [(0, info.shape[0] if info.shape else 1)]
        tensor, num_bytes = self._reader.read_part(place.source, rows=rows or every, columns=columns)
        self.bytes_read += num_bytes
        return tensor.t() if place.placement.transposed else tensor

    def _check(self, name: str, info: TensorInfo) -> None:
        """Of dense tensors: the whole has the shape that the config says."""
        place = self._places[name]
        module, _, suffix = name.rpartition(".")
        if suffix in _PACKED or module not in self._features:
            return
        out_features, in_features = self._features[module]
        if place.placement.rows is not None:
            out_features = place.placement.rows.num_rows
        shape = [out_features, in_features][: len(info.shape)]
        if place.placement.transposed:
            shape.reverse()
        if list(info.shape) != shape:
            raise CheckpointError(
                f"{info.path}: {info.name} has the wrong shape",
                got=list(info.shape),
                expected=f"{shape} by config.json",
            )

    def _out_runs(self, name: str, info: TensorInfo, outs: Span | None) -> list[Span] | None:
        """The runs of output features of the file's tensor that are wanted, in its elements; None for all."""
        place = self._places[name]
        module, _, suffix = name.rpartition(".")
        if suffix == "g_idx" or (place.placement.rows is None and outs is None):
            return None
        bits = self._packed[module].bits if suffix == "qzeros" else _WORD_BITS
        rows = place.placement.rows
        if rows is None:
            assert outs is not None
            runs, total = [outs], self._features[module][0]
        else:
            runs, total = runs_of_part(rows, place.part, outs), rows.num_rows
        size = info.shape[-1] if suffix in _PACKED or place.placement.transposed else info.shape[0]
        if suffix not in _PACKED and size != total:
            raise CheckpointError(f"{info.path}: {info.name} has the wrong shape", got=list(info.shape), expected=total)
        return [_words(run, bits, total, info.name) for run in runs]

    def _in_span(self, module: str, suffix: str, ins: Span) -> Span:
        """A span of input features in the elements of a tensor of this kind."""
        total = self._features[module][1]
        if suffix == "qweight":
            return _words(ins, self._packed[module].bits, total, f"{module}.{suffix}")
        if suffix in ("scales", "qzeros"):
            groups = self._packed[module]
            return group_span(groups, ins, total)
        return ins


def group_span(groups: PackedGroups, ins: Span, in_features: int) -> Span:
    """The groups that a span of input features needs."""
    if not groups.ordered:
        return 0, -(-in_features // groups.width)
    return ins[0] // groups.width, -(-ins[1] // groups.width)


def runs_of_part(rows: Rows, part: int, span: Span | None) -> list[Span]:
    """Where rows begin..end of one part lie in a fused tensor: runs, in their order; all of the part for None."""
    begin, end = (0, rows.rows_of(part)) if span is None else span
    runs: list[Span] = []
    at = own = 0
    for _ in range(rows.repeats):
        for other, count in rows.blocks:
            if other == part:
                first, last = max(begin, own), min(end, own + count)
                if first < last:
                    run = (at + first - own, at + last - own)
                    if runs and runs[-1][1] == run[0]:
                        runs[-1] = (runs[-1][0], run[1])
                    else:
                        runs.append(run)
                own += count
            at += count
    return runs


def _words(span: Span, bits: int, total: int, name: str) -> Span:
    """A span of features in 32-bit words; the last word of a tensor may be filled up."""

    def place(feature: int) -> int:
        words, rest = divmod(feature * bits, _WORD_BITS)
        if rest and feature != total:
            raise CheckpointError(f"{name} cannot be cut inside a packed word", got=f"feature {feature}")
        return words + bool(rest)

    return place(span[0]), place(span[1])


def total_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of all storages, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def is_ordered(g_idx_I: Tensor, width: int) -> bool:
    """Whether groups are runs of `width` input features, one after another (or a file left all at zero)."""
    plain_I = torch.arange(len(g_idx_I)) // width
    return bool((g_idx_I == plain_I).all()) or int(g_idx_I.max()) == 0
