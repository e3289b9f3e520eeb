"""Which part of a model each of several processes holds. Torch-free.

N processes share every block of a stage (tensor parallelism, Shoeybi et al., 2019, arXiv:1909.08053): query, key,
value, gate and up projections are cut by their outputs, whole heads at a time, output and down projections by their
inputs. M stages hold a run of blocks each (pipeline parallelism). Embedding, learned positions and output layer are cut
by rows over all N M processes, whatever their stage.

Nothing has to divide: process r of a stage takes as even a share as whole heads allow, and of the MLP what makes up for
the rest. With fewer kv heads than processes, those that share a kv head hold a copy of it each.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from burnish.errors import ConfigError
from burnish.models.config import ModelConfig

Span = tuple[int, int]
"""Begin and end, half open."""

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
# Sizes that kernels like; taken where so many of them are there for each process.
_LIKED = (64, 32, 16, 8)
_LEAST_UNITS = 4
_MOST_TRIED = 16


@dataclass(frozen=True, kw_only=True)
class CutUnits:
    """Where linears may be cut: at multiples of so many features.

    Attributes:
        heads: of the query features.
        keys: of the key and value features.
        inner: of the MLP's.
        vocab: of the output layer's.
        why: what asks for it, for messages.
    """

    heads: int = 1
    keys: int = 1
    inner: int = 1
    vocab: int = 1
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class ShardCut:
    """What one process holds.

    Attributes:
        rank: its number; those of a stage follow each other.
        layers: its blocks.
        heads, kv_heads, inner: its part of every one of them.
        vocab, positions: its rows of embedding and output layer, and of learned positions.
    """

    rank: int
    tensor_parallel: int
    pipeline_parallel: int
    layers: Span
    heads: Span
    kv_heads: Span
    inner: Span
    vocab: Span
    positions: Span

    @property
    def stage(self) -> int:
        return self.rank // self.tensor_parallel

    @property
    def place(self) -> int:
        """Which one of its stage."""
        return self.rank % self.tensor_parallel

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def num_layers(self) -> int:
        return self.layers[1] - self.layers[0]

    def config(self, config: ModelConfig) -> ModelConfig:
        """The shape of this part; its layers keep their numbers, so their count stays."""
        return replace(
            config,
            num_heads=_size(self.heads),
            num_kv_heads=_size(self.kv_heads),
            intermediate_size=_size(self.inner),
            vocab_size=_size(self.vocab),
        )

    def cache_config(self, config: ModelConfig) -> ModelConfig:
        """As `config`, with this part's blocks alone: for what depends on how many there are."""
        windows = config.layer_windows
        return replace(
            self.config(config),
            num_layers=self.num_layers,
            layer_windows=None if windows is None else windows[slice(*self.layers)],
        )

    def holds(self, name: str) -> bool:
        """Whether a canonical module or tensor is here, in part at least."""
        layer = layer_of(name)
        return layer < 0 or self.layers[0] <= layer < self.layers[1]

    def spans(self, module: str, config: ModelConfig) -> tuple[Span | None, Span | None]:
        """Which output and which input features of a canonical module are here; None for all."""
        role = module.rpartition(".")[2]
        head = config.head_dim
        query, key = _scaled(self.heads, head), _scaled(self.kv_heads, head)
        outs = {
            "q_proj": (query, config.num_heads * head),
            "k_proj": (key, config.num_kv_heads * head),
            "v_proj": (key, config.num_kv_heads * head),
            "gate_proj": (self.inner, config.intermediate_size),
            "up_proj": (self.inner, config.intermediate_size),
            "embed_tokens": (self.vocab, config.vocab_size),
            "lm_head": (self.vocab, config.vocab_size),
            "embed_positions": (self.positions, config.max_position_embeddings),
        }
        ins = {
            "o_proj": (query, config.num_heads * head),
            "down_proj": (self.inner, config.intermediate_size),
        }
        return _unless_whole(outs.get(role)), _unless_whole(ins.get(role))


def layer_of(name: str) -> int:
    """The block that a canonical name belongs to; -1 for none."""
    match = _LAYER.match(name)
    return -1 if match is None else int(match[1])


def cut_model(
    config: ModelConfig, *, tensor_parallel: int, pipeline_parallel: int, units: CutUnits | None = None
) -> tuple[ShardCut, ...]:
    """What each process holds, by rank.

    Args:
        units: where the model's quantized linears may be cut.

    Raises:
        ConfigError: there are more processes than layers or heads, or the units do not allow it; says which do.
    """
    units = units or CutUnits()
    if tensor_parallel < 1 or pipeline_parallel < 1:
        raise ConfigError(
            "tensor_parallel or pipeline_parallel is out of range",
            got=f"{tensor_parallel} and {pipeline_parallel}",
            expected="1 or more",
        )
    if pipeline_parallel > config.num_layers:
        raise ConfigError(
            "there are more pipeline stages than layers", got=pipeline_parallel, expected=f"at most {config.num_layers}"
        )
    dealt = _deal_heads(config, tensor_parallel, units)
    inner = None if dealt is None else _deal_inner(config, dealt, units)
    if dealt is None or inner is None:
        works = [str(n) for n in range(1, _MOST_TRIED + 1) if _can_cut(config, n, units)]
        because = f", as {units.why}" if units.why else ""
        raise ConfigError(
            f"{config.num_heads} heads and {config.intermediate_size} inner features cannot be cut that way{because}",
            got=f"tensor_parallel {tensor_parallel}",
            expected=f"one of {', '.join(works)}",
        )
    world = tensor_parallel * pipeline_parallel
    if world > config.vocab_size:
        raise ConfigError("there are more processes than words", got=world, expected=f"at most {config.vocab_size}")
    vocab = _even(config.vocab_size, world, _liked(config.vocab_size, world, units.vocab))
    rows = config.max_position_embeddings
    positions = _even(rows, world, 1) if config.position == "learned" else [(0, rows)] * world
    layers = _even(config.num_layers, pipeline_parallel, 1)
    assert layers is not None
    if positions is None:
        raise ConfigError("there are more processes than positions", got=world, expected=f"at most {rows}")
    if vocab is None:
        raise ConfigError(f"the output layer cannot be cut so often, as {units.why}", got=f"{world} processes")
    cuts = []
    for rank in range(world):
        heads, kv_heads = dealt[rank % tensor_parallel]
        cuts.append(
            ShardCut(
                rank=rank,
                tensor_parallel=tensor_parallel,
                pipeline_parallel=pipeline_parallel,
                layers=layers[rank // tensor_parallel],
                heads=heads,
                kv_heads=kv_heads,
                inner=inner[rank % tensor_parallel],
                vocab=vocab[rank],
                positions=positions[rank],
            )
        )
    return tuple(cuts)


def _can_cut(config: ModelConfig, processes: int, units: CutUnits) -> bool:
    dealt = _deal_heads(config, processes, units)
    return dealt is not None and _deal_inner(config, dealt, units) is not None


def _deal_heads(config: ModelConfig, processes: int, units: CutUnits) -> list[tuple[Span, Span]] | None:
    """(query heads, kv heads) of each process; None where there are too few."""
    kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    if processes <= kv_heads:
        # Both the key features and the query features that go with them have to end at a unit.
        unit = math.lcm(_multiple(group * config.head_dim, units.heads), _multiple(config.head_dim, units.keys))
        spans = _even(kv_heads, processes, unit)
        return None if spans is None else [(_scaled(span, group), span) for span in spans]
    if kv_heads > 1 and (config.head_dim % units.keys or group * config.head_dim % units.heads):
        return None
    dealt: list[tuple[Span, Span]] = []
    for kv_head, sharers in enumerate(_even(processes, kv_heads, 1) or []):
        parts = _even(group, _size(sharers), _multiple(config.head_dim, units.heads))
        if parts is None:
            return None
        first = kv_head * group
        dealt += [((first + begin, first + end), (kv_head, kv_head + 1)) for begin, end in parts]
    return dealt


def _deal_inner(config: ModelConfig, dealt: Sequence[tuple[Span, Span]], units: CutUnits) -> list[Span] | None:
    """The MLP's features of each process, so that all hold about as many weights of a block."""
    processes, inner = len(dealt), config.intermediate_size
    unit = _liked(inner, processes, units.inner)
    per_feature = 3 if config.mlp == "gated" else 2
    attention = [2 * config.head_dim * (_size(heads) + _size(kv_heads)) for heads, kv_heads in dealt]
    share = (sum(attention) + per_feature * inner) / processes
    wanted = [max(0.0, (share - own) / per_feature) for own in attention]
    num_units, ends, so_far = -(-inner // unit), [0], 0.0
    if num_units < processes:
        return None
    for place, size in enumerate(wanted):
        so_far += size * inner / sum(wanted) if sum(wanted) else inner / processes
        left = processes - place - 1
        ends.append(min(max(round(so_far / unit), ends[-1] + 1), num_units - left) if left else num_units)
    return [(min(inner, begin * unit), min(inner, end * unit)) for begin, end in itertools.pairwise(ends)]


def _even(count: int, parts: int, unit: int) -> list[Span] | None:
    """0..count in so many runs of about the same length that end at multiples of `unit`; None where some are empty."""
    units = -(-count // unit)
    if units < parts:
        return None
    ends = [min(count, unit * (units * part // parts)) for part in range(parts + 1)]
    return list(itertools.pairwise(ends))


def _liked(count: int, parts: int, unit: int) -> int:
    """A multiple of `unit` that kernels like, if there are enough of them to be fair."""
    for liked in _LIKED:
        both = math.lcm(liked, unit)
        if count // both >= _LEAST_UNITS * parts:
            return both
    return unit


def _multiple(head_dim: int, unit: int) -> int:
    """How many heads have a whole number of units."""
    return unit // math.gcd(head_dim, unit)


def _scaled(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor


def _size(span: Span) -> int:
    return span[1] - span[0]


def _unless_whole(found: tuple[Span, int] | None) -> Span | None:
    return None if found is None or found[0] == (0, found[1]) else found[0]
