"""A decoder's blocks rebuilt for the GPU kernels: fewer launches, and weights of 4 or 8 bits read as they are.

Query, key and value products are one, gate and up another; the residual is added where it is normed; rotation and the
cache's writes are one kernel. The linears keep their places' names, so that adapters find them.

Weights in 8 bits meet activations in 16 here, where `Int8Linear` would round those as well: closer to the dense model,
and as fast, because with few rows only reading the weight takes time.

Shapes: T packed tokens, D hidden, H query heads, K kv heads, E head dim, I intermediate.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.int8_linear import Int8Linear
from burnish.engine.packing import joinable, joined
from burnish.kernels.gpu.grouped_weight import CHUNK, GroupedWeight, join_grouped_weights, pack_grouped_weight
from burnish.kernels.gpu.rows import GATES, add_rmsnorm, gated
from burnish.kernels.gpu.weight_only import weight_only_linear
from burnish.models.attention import AttentionSpec
from burnish.models.decoder import MLP, Block, Decoder, RMSNorm, SelfAttention
from burnish.models.rope import RopeTable


class PackedQueries(Protocol):
    """Rotates, keeps and attends; see `GpuAttention.attend`."""

    def attend(self, layer: int, qkv_TXE: Tensor, rope: RopeTable | None, spec: AttentionSpec) -> Tensor: ...


class WeightOnlyLinear(nn.Module):
    """y = x W' + b through `weight_only_linear`. Inference only."""

    def __init__(self, weight: GroupedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.in_features, self.out_features = weight.in_features, weight.out_features
        tensors = {"codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros, "order": weight.column_order}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = weight_only_linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class SideBySide(nn.Module):
    """The outputs of linears that cannot be joined, one after the other."""

    def __init__(self, linears: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class GpuSelfAttention(nn.Module):
    """`SelfAttention` over packed tokens."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.layer, self.spec, self.head_dim = attention.layer, attention.spec, attention.head_dim
        self.qkv_proj = joined_for_gpu([attention.q_proj, attention.k_proj, attention.v_proj])
        attention.q_proj = attention.k_proj = attention.v_proj = None  # type: ignore[assignment]
        self.o_proj = linear_for_gpu(attention.o_proj)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(self, x_TD: Tensor, rope: RopeTable | None, attention: PackedQueries) -> Tensor:
        qkv_TXE = self.qkv_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            heads, kv_heads = self.spec.num_heads, self.spec.num_kv_heads
            q_THE, k_TKE, v_TKE = qkv_TXE.split((heads, kv_heads, kv_heads), dim=1)
            qkv_TXE = torch.cat((_normed(self.q_norm, q_THE), _normed(self.k_norm, k_TKE), v_TKE), dim=1)
        return self.o_proj(attention.attend(self.layer, qkv_TXE.contiguous(), rope, self.spec).flatten(1))


class GpuMLP(nn.Module):
    """`MLP` over packed tokens."""

    def __init__(self, mlp: MLP, *, activation: str) -> None:
        super().__init__()
        self.activation, self.activation_name = mlp.activation, activation
        # Only what there is has a name: adapters look linears up by it.
        self.is_gated = mlp.gate_proj is not None
        if mlp.gate_proj is None:
            self.up_proj = linear_for_gpu(mlp.up_proj)
        else:
            self.gate_up_proj = joined_for_gpu([mlp.gate_proj, mlp.up_proj])
            mlp.gate_proj = None
        mlp.up_proj = None  # type: ignore[assignment]
        self.down_proj = linear_for_gpu(mlp.down_proj)

    def forward(self, x_TD: Tensor) -> Tensor:
        if not self.is_gated:
            return self.down_proj(self.activation(self.up_proj(x_TD)))
        gate_up_TX = self.gate_up_proj(x_TD)
        if self.activation_name in GATES:
            return self.down_proj(gated(gate_up_TX, activation=self.activation_name))
        gate_TI, up_TI = gate_up_TX.chunk(2, dim=-1)
        return self.down_proj(self.activation(gate_TI) * up_TI)


class GpuBlock(nn.Module):
    """`Block` whose last sum is left to the next one's norm."""

    def __init__(self, block: Block, *, activation: str) -> None:
        super().__init__()
        assert isinstance(block.self_attn, SelfAttention)
        assert isinstance(block.mlp, MLP)
        self.parallel_residual, self.residual_from_norm = block.parallel_residual, block.residual_from_norm
        self.input_layernorm = block.input_layernorm
        self.post_attention_layernorm = block.post_attention_layernorm
        self.attention_output_norm, self.mlp_output_norm = block.attention_output_norm, block.mlp_output_norm
        self.self_attn = GpuSelfAttention(block.self_attn)
        self.mlp = GpuMLP(block.mlp, activation=activation)

    def forward(
        self, x_TD: Tensor, added_TD: Tensor | None, rope: RopeTable | None, attention: PackedQueries
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and what has to be added to it."""
        x_TD, normed_TD = add_norm(self.input_layernorm, x_TD, added_TD)
        attended_TD = self.self_attn(normed_TD, rope, attention)
        if self.attention_output_norm is not None:
            _, attended_TD = add_norm(self.attention_output_norm, attended_TD, None)
        if self.parallel_residual:
            norm = self.post_attention_layernorm
            inner_TD = normed_TD if norm is None else add_norm(norm, x_TD, None)[1]
            return x_TD, self.mlp(inner_TD) + attended_TD
        assert self.post_attention_layernorm is not None
        base_TD = normed_TD if self.residual_from_norm else x_TD
        x_TD, normed_TD = add_norm(self.post_attention_layernorm, base_TD, attended_TD)
        out_TD = self.mlp(normed_TD)
        if self.mlp_output_norm is not None:
            _, out_TD = add_norm(self.mlp_output_norm, out_TD, None)
        return normed_TD if self.residual_from_norm else x_TD, out_TD


def against_layers(decoder: Decoder) -> str | None:
    """Why this decoder's blocks cannot be rebuilt; None where they can."""
    for index, block in enumerate(decoder.model.layers):
        plain = type(block) is Block and type(block.self_attn) is SelfAttention and type(block.mlp) is MLP
        if not plain:
            return f"layer {index} is laid out for something else"
    return None


def rebuild_for_gpu(decoder: Decoder) -> int:
    """Replace the decoder's blocks and its output layer in place, each weight freed as soon as it is laid out anew.

    Afterwards the decoder's own forward is of no use.

    Returns:
        How many modules were replaced.
    """
    layers = decoder.model.layers
    with torch.no_grad():
        for index in range(len(layers)):
            block = layers[index]
            assert isinstance(block, Block)
            layers[index] = GpuBlock(block, activation=decoder.config.activation)
        if decoder.lm_head is not None:
            decoder.lm_head = linear_for_gpu(decoder.lm_head)  # type: ignore[assignment]
    if decoder.device.type == "cuda":
        # What the old layout took is given back in pieces that no block of the cache fits into.
        torch.cuda.empty_cache()
    return 2 * len(layers)


def linear_for_gpu(linear: nn.Module) -> nn.Module:
    """A linear with quantized weights as the kernels read them; any other as it is."""
    weight = _grouped_weight(linear)
    if weight is None:
        return linear
    assert isinstance(linear, Int8Linear | GroupQuantizedLinear)
    return WeightOnlyLinear(weight, linear.bias)


def joined_for_gpu(linears: list[nn.Module]) -> nn.Module:
    """One linear for several over the same input."""
    if joinable(*linears):
        return joined(linears)  # type: ignore[arg-type]
    made = [linear_for_gpu(linear) for linear in linears]
    weights = [one.weight for one in made if isinstance(one, WeightOnlyLinear)]
    biases: list[Tensor] = [one.bias for one in made if isinstance(one, WeightOnlyLinear) and one.bias is not None]
    if len(weights) == len(made) and len(biases) in (0, len(made)):
        whole = join_grouped_weights(weights)
        if whole is not None:
            return WeightOnlyLinear(whole, torch.cat(biases) if biases else None)
    return SideBySide(made)


def add_norm(norm: nn.Module, x_TD: Tensor, added_TD: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum and its norm."""
    if isinstance(norm, RMSNorm):
        return add_rmsnorm(x_TD, added_TD, norm.weight, eps=norm.eps, offset=norm.offset)
    x_TD = x_TD if added_TD is None else x_TD + added_TD
    return x_TD, norm(x_TD)


def _normed(norm: nn.Module, x_THE: Tensor) -> Tensor:
    return add_norm(norm, x_THE.reshape(-1, x_THE.shape[-1]), None)[1].view_as(x_THE)


def _grouped_weight(linear: nn.Module) -> GroupedWeight | None:
    """None for a linear that the kernels do not know, or whose 8-bit weights have free zero points."""
    if type(linear) is Int8Linear:
        if linear.in_features % CHUNK == 0:
            return GroupedWeight(
                codes=linear.weight,
                scales=linear.weight_scale[None],
                zeros=None,
                in_features=linear.in_features,
                group_width=linear.in_features,
                bits=8,
                column_order=None,
            )
        groups_K = torch.zeros(linear.in_features, dtype=torch.int32, device=linear.weight.device)
        return pack_grouped_weight(linear.weight, linear.weight_scale[:, None], None, groups_K, bits=8)
    if type(linear) is not GroupQuantizedLinear:
        return None
    whole = linear.quantized()
    if linear.bits <= 4:
        return pack_grouped_weight(whole.ints, whole.scales, whole.zeros.to(torch.uint8), whole.g_idx, bits=4)
    if not bool((whole.zeros == 128).all()):
        return None
    centred_NK = (whole.ints.to(torch.int16) - 128).to(torch.int8)
    return pack_grouped_weight(centred_NK, whole.scales, None, whole.g_idx, bits=8)
