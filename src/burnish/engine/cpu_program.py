"""From a decoder's modules to the structs and packed weights that the compiled kernels compute with.

Shapes: N output features, K input features, D hidden, H query heads, P positions, F rotated frequencies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_void_p

import torch
from torch import Tensor, nn

from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.int8_linear import Int8Linear
from burnish.kernels.cpu.arena import Arena
from burnish.kernels.cpu.library import CpuLibrary
from burnish.kernels.cpu.packing import (
    PackedLinear,
    interleaved,
    joined_bias,
    pack_float,
    pack_grouped,
    pack_int8,
)
from burnish.kernels.cpu.structs import ACTIVATIONS, DecoderStruct, Format, Layer, Norm
from burnish.models.attention import AttentionSpec
from burnish.models.decoder import MLP, Block, Decoder, RMSNorm, SelfAttention
from burnish.models.rope import RopeTable

LINEARS = (nn.Linear, Int8Linear, GroupQuantizedLinear)
# Longer rope tables are made step by step instead of once.
_LONGEST_TABLE = 32768


def against(decoder: Decoder) -> str | None:
    """Why this decoder cannot be packed; None where it can."""
    if decoder.dtype not in (torch.float32, torch.bfloat16):
        return f"its dtype is {str(decoder.dtype).removeprefix('torch.')}"
    if decoder.config.head_dim % 2:
        return f"its heads have {decoder.config.head_dim} features, an odd number"
    for layer, block in enumerate(decoder.model.layers):
        if not isinstance(block, Block) or type(block.self_attn) is not SelfAttention or type(block.mlp) is not MLP:
            return f"layer {layer} is laid out for torch"
        for group in _fused(block):
            reason = _against_fusing(group)
            if reason is not None:
                return f"in layer {layer}, {reason}"
    if decoder.lm_head is not None and type(decoder.lm_head) not in LINEARS:
        return f"the output layer is a {type(decoder.lm_head).__name__}"
    return None


class CpuProgram:
    """A decoder, packed.

    Args:
        consume: free each of the decoder's weights as soon as it is packed; the decoder is of no use afterwards.
        max_positions: longest sequence that will come.

    Attributes:
        struct: what the kernels read; its layers' cache pointers are still to be set.
        num_bytes: bytes of all tensors that it points into.
    """

    def __init__(self, decoder: Decoder, library: CpuLibrary, *, consume: bool, max_positions: int) -> None:
        self._library = library
        self._consume = consume
        self._held: dict[int, Tensor] = {}
        self._arena = Arena()
        config = decoder.config
        self.layers = (Layer * config.num_layers)()
        self.struct = DecoderStruct(
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            num_layers=config.num_layers,
            gated=config.mlp == "gated",
            activation=ACTIVATIONS[config.activation],
            parallel_residual=config.parallel_residual,
            shared_norm=config.shared_norm,
            residual_from_norm=config.residual_from_norm,
            rotary_dim=config.rotary_dim if config.position == "rotary" else 0,
            rotary_interleaved=config.rotary_interleaved,
            max_positions=max_positions,
            embedding_scale=_rounded(config.embedding_scale, decoder.dtype),
            attention_softcap=config.attention_softcap or 0.0,
            logit_softcap=config.logit_softcap or 0.0,
            alibi_scale=config.alibi_scale,
            alibi_bfloat16=config.alibi_bfloat16,
        )
        trunk = decoder.model
        # A tied output layer is packed from the embedding, which therefore stays.
        head = decoder.lm_head
        self.struct.head = self._pack([head if head is not None else trunk.embed_tokens], keep=head is None)
        for index, block in enumerate(trunk.layers):
            assert isinstance(block, Block)
            self._fill_layer(self.layers[index], block)
        self.struct.layers = self.layers
        self._fill_ends(decoder)
        self._ropes = decoder._ropes
        self._rotary_by_step = self._ropes is not None and (
            any(rope.needs_length for rope in self._ropes) or max_positions > _LONGEST_TABLE
        )
        if self._ropes is not None and not self._rotary_by_step:
            for name, tensor in self.rope_rows(torch.arange(max_positions), None).items():
                setattr(self.struct, name, self._point(tensor))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._held.values())

    @property
    def rotary_by_step(self) -> bool:
        """True where angles are computed for every step and handed in with it."""
        return self._rotary_by_step

    def rope_rows(self, positions_P: Tensor, lengths_P: Tensor | None) -> dict[str, Tensor]:
        """cos and sin of the global and local rotation, (P, F) float32 each, by their names in the structs."""
        assert self._ropes is not None
        lengths_1P = None if lengths_P is None else lengths_P[None]
        tables = [rope.table(positions_P[None], dtype=torch.float32, lengths_BT=lengths_1P) for rope in self._ropes]
        return {
            f"{prefix}rope_{name}": _rows(table, name)
            for prefix, table in zip(("", "local_"), tables)
            for name in ("cos", "sin")
        }

    def _fill_layer(self, layer: Layer, block: Block) -> None:
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(attention, SelfAttention)
        assert isinstance(mlp, MLP)
        for name in ("input_norm", "post_attention_norm"):
            setattr(layer, name, self._norm(getattr(block, name.replace("norm", "layernorm"))))
        for name in ("attention_output_norm", "mlp_output_norm"):
            setattr(layer, name, self._norm(getattr(block, name)))
        layer.q_norm, layer.k_norm = self._norm(attention.q_norm), self._norm(attention.k_norm)
        layer.qkv = self._pack([attention.q_proj, attention.k_proj, attention.v_proj])
        layer.o = self._pack([attention.o_proj])
        layer.up = self._pack_up(mlp)
        layer.down = self._pack([mlp.down_proj])
        spec: AttentionSpec = attention.spec
        layer.scale = spec.scale
        layer.window = spec.window or 0
        layer.local_rope = spec.window is not None

    def _fill_ends(self, decoder: Decoder) -> None:
        trunk, struct = decoder.model, self.struct
        embedding = trunk.embed_tokens.weight.detach().contiguous()
        struct.embedding = self._point(embedding)
        struct.embedding_format = Format.F32 if embedding.dtype == torch.float32 else Format.BF16
        struct.embedding_norm, struct.final_norm = self._norm(trunk.embed_norm), self._norm(trunk.norm)
        if trunk.embed_positions is not None:
            struct.position_embedding = self._point(trunk.embed_positions.weight.detach().float().contiguous())
        first = trunk.layers[0].self_attn
        assert isinstance(first, SelfAttention)
        if first.spec.alibi_slopes_H is not None:
            struct.alibi_slopes = self._point(first.spec.alibi_slopes_H.float().contiguous())

    def _norm(self, norm: nn.Module | None) -> Norm:
        if norm is None:
            return Norm(kind=0)
        if isinstance(norm, RMSNorm):
            weight = self._point(norm.weight.detach().float() + norm.offset)
            return Norm(kind=1, width=norm.weight.shape[0], eps=norm.eps, weight=weight)
        assert isinstance(norm, nn.LayerNorm)
        weight, bias = self._point(norm.weight.detach().float()), self._point(norm.bias.detach().float())
        return Norm(kind=2, width=norm.weight.shape[0], eps=norm.eps, weight=weight, bias=bias)

    def _pack(self, parts: Sequence[nn.Module], *, keep: bool = False) -> ctypes.Structure:
        """Several linears with the same input as one, their outputs one after the other."""
        sizes = [_num_outputs(part) for part in parts]
        bias = joined_bias([getattr(part, "bias", None) for part in parts], sizes)
        return self._packed(parts, lambda tensors: torch.cat(list(tensors)), bias, keep=keep)

    def _pack_up(self, mlp: MLP) -> ctypes.Structure:
        if mlp.gate_proj is None:
            return self._pack([mlp.up_proj])
        parts = [mlp.gate_proj, mlp.up_proj]
        biases = [part.bias for part in parts]
        bias = None
        if any(found is not None for found in biases):
            size = _num_outputs(mlp.up_proj)
            bias = interleaved(*[torch.zeros(size) if found is None else found.detach().float() for found in biases])
        return self._packed(parts, lambda tensors: interleaved(*tensors), bias)

    def _packed(
        self,
        parts: Sequence[nn.Module],
        join: Callable[[Sequence[Tensor]], Tensor],
        bias_N: Tensor | None,
        *,
        keep: bool = False,
    ) -> ctypes.Structure:
        if all(isinstance(part, GroupQuantizedLinear) for part in parts):
            packed = self._pack_groups([part for part in parts if isinstance(part, GroupQuantizedLinear)], join, bias_N)
        elif all(isinstance(part, Int8Linear) for part in parts):
            layers = [part for part in parts if isinstance(part, Int8Linear)]
            packed = pack_int8(
                self._library,
                join([layer.weight for layer in layers]),
                join([layer.weight_scale for layer in layers]),
                bias_N=bias_N,
                arena=self._arena,
            )
        else:
            weights = [part.get_parameter("weight").detach() for part in parts]
            packed = pack_float(
                self._library, weights[0] if len(weights) == 1 else join(weights), bias_N=bias_N, arena=self._arena
            )
        for tensor in packed.tensors:
            self._held[tensor.data_ptr()] = tensor
        if self._consume and not keep:
            for part in parts:
                _free(part)
        return packed.struct

    def _pack_groups(
        self,
        layers: Sequence[GroupQuantizedLinear],
        join: Callable[[Sequence[Tensor]], Tensor],
        bias_N: Tensor | None,
    ) -> PackedLinear:
        wholes = [layer.quantized() for layer in layers]
        order_K = _order(wholes[0].g_idx)
        ints_NK = join([whole.ints if order_K is None else whole.ints[:, order_K] for whole in wholes])
        return pack_grouped(
            self._library,
            ints_NK,
            join([whole.scales for whole in wholes]),
            join([whole.zeros for whole in wholes]),
            bits=layers[0].bits,
            group_size=layers[0].group_size,
            order_K=order_K,
            bias_N=bias_N,
            arena=self._arena,
        )

    def _point(self, tensor: Tensor) -> c_void_p:
        self._held[tensor.data_ptr()] = tensor
        return c_void_p(tensor.data_ptr())


def _fused(block: Block) -> list[list[nn.Module]]:
    attention, mlp = block.self_attn, block.mlp
    gates = [] if mlp.gate_proj is None else [mlp.gate_proj]
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [*gates, mlp.up_proj],
        [mlp.down_proj],
    ]


def _against_fusing(parts: Sequence[nn.Module]) -> str | None:
    kinds = {type(part) for part in parts}
    if not kinds <= set(LINEARS):
        return f"a linear is a {next(iter(kinds - set(LINEARS))).__name__}"
    if len(kinds) > 1:
        return "linears with the same input are quantized in different ways"
    groups = [part for part in parts if isinstance(part, GroupQuantizedLinear)]
    if not groups:
        return None
    # Up to 4 bits are laid out alike.
    if len({(layer.bits <= 4, layer.group_size) for layer in groups}) > 1:
        return "linears with the same input have 8 bits and fewer, or different groups"
    first = groups[0]
    if any(layer.scales_dtype != torch.float16 for layer in groups):
        return "its scales are not float16"
    if first.bits not in (2, 3, 4, 8):
        return f"its linears have {first.bits} bits"
    if first.group_size != -1 and first.group_size < first.in_features and first.group_size % 8:
        return f"its group size is {first.group_size}"
    # Packed layers tell their columns' groups without being unpacked.
    columns = [_column_groups(layer) for layer in groups]
    if any(not torch.equal(other, columns[0]) for other in columns[1:]):
        return "linears with the same input order their columns differently"
    size = first.in_features if first.group_size == -1 else first.group_size
    counts = torch.bincount(columns[0].long())
    if bool((counts[:-1] != size).any()) or int(counts[-1]) > size:
        return "its groups are of uneven size"
    return None


def _column_groups(layer: GroupQuantizedLinear) -> Tensor:
    return layer.groups_of_columns()


def _order(g_idx_K: Tensor) -> Tensor | None:
    order_K = torch.argsort(g_idx_K, stable=True)
    return None if bool((order_K == torch.arange(order_K.shape[0])).all()) else order_K


def _num_outputs(part: nn.Module) -> int:
    if isinstance(part, nn.Embedding):
        return part.num_embeddings
    assert isinstance(part, LINEARS)
    return part.out_features


def _free(part: nn.Module) -> None:
    for name, parameter in part.named_parameters(recurse=False):
        setattr(part, name, nn.Parameter(parameter.new_empty(0), requires_grad=False))
    for name, buffer in part.named_buffers(recurse=False):
        setattr(part, name, buffer.new_empty(0))


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()


def _rows(table: RopeTable, name: str) -> Tensor:
    values: Tensor = getattr(table, name)
    return values.flatten(0, 2).contiguous()
