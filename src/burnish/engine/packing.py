"""Making a loaded decoder quicker without changing what it computes: fewer, larger matrix products in a better layout.

Query, key and value projections become one product, gate and up another. On CPUs with bfloat16 units, bfloat16
weights are laid out once as the matrix units want them, where otherwise every call would do it again. Each weight is
freed as soon as it is repacked. Only plain nn.Linear are touched: adapters and quantized linears keep their own way
of computing.

Afterwards the decoder is for generating only: its canonical parameter names are gone.

Shapes: B sequences, T tokens, D hidden, H query heads, K kv heads, E head dim, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.models.attention import Attention
from burnish.models.decoder import MLP, Decoder, SelfAttention
from burnish.models.rope import RopeTable
from burnish.models.shard_decoder import Elsewhere

# The batch for which oneDNN picks the layout; it serves single rows and prefill about as well.
_LAYOUT_ROWS = 32


class PackedAttention(nn.Module):
    """`SelfAttention` with one product for queries, keys and values, and one rotation for queries and keys."""

    def __init__(self, attention: SelfAttention) -> None:
        super().__init__()
        self.layer, self.spec, self.head_dim = attention.layer, attention.spec, attention.head_dim
        self.qkv_proj = joined([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj = attention.o_proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(self, x_BTD: Tensor, rope: RopeTable | None, attention: Attention) -> Tensor:
        heads, kv_heads = self.spec.num_heads, self.spec.num_kv_heads
        qkv = self.qkv_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        qk, v_BTKE = qkv.split((heads + kv_heads, kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHE, k_BTKE = qk.split((heads, kv_heads), dim=2)
            qk = torch.cat((self.q_norm(q_BTHE), self.k_norm(k_BTKE)), dim=2)
        if rope is not None:
            qk = rope.rotate(qk)
        q_BTHE, k_BTKE = qk.split((heads, kv_heads), dim=2)
        out_BHTE = attention.attend(
            self.layer, q_BTHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2), self.spec
        )
        return self.o_proj(out_BHTE.transpose(1, 2).flatten(2))


class PackedMLP(nn.Module):
    """`MLP` with one product for gate and up."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        assert isinstance(mlp.gate_proj, nn.Linear)
        self.activation = mlp.activation
        self.gate_up_proj = joined([mlp.gate_proj, mlp.up_proj])
        self.down_proj = mlp.down_proj

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTI, up_BTI = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate_BTI).mul_(up_BTI))


class PrepackedLinear(nn.Module):
    """A linear whose weight is kept in oneDNN's own layout. CPU, bfloat16; inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _LAYOUT_ROWS)

    @property
    def num_bytes(self) -> int:
        """Bytes of weight and bias."""
        elements = self.in_features * self.out_features + (0 if self.bias is None else self.out_features)
        return elements * self.weight.element_size()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_decoder(decoder: Decoder) -> int:
    """Join and lay out the decoder's plain linears, in place.

    Returns:
        How many modules were replaced by packed ones.
    """
    packed = 0
    with torch.no_grad():
        prepack = decoder.device.type == "cpu" and decoder.dtype == torch.bfloat16 and prepacking_works()
        for block in decoder.model.layers:
            if isinstance(block, Elsewhere):
                continue
            attention, mlp = block.self_attn, block.mlp
            if isinstance(attention, SelfAttention) and joinable(attention.q_proj, attention.k_proj, attention.v_proj):
                block.self_attn = PackedAttention(attention)
                attention.q_proj = attention.k_proj = attention.v_proj = None  # type: ignore[assignment]
                packed += 1
            if isinstance(mlp, MLP) and joinable(mlp.gate_proj, mlp.up_proj):
                block.mlp = PackedMLP(mlp)
                mlp.gate_proj = mlp.up_proj = None  # type: ignore[assignment]
                packed += 1
            if prepack:
                parts = (block.get_submodule(name) for name in ("self_attn", "mlp"))
                packed += sum(_prepack_children(part) for part in parts)
        if prepack:
            packed += _prepack_children(decoder)
    return packed


def prepacking_works() -> bool:
    """Whether this build of torch and this processor run bfloat16 products in a prepared layout."""
    try:
        if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        linear = nn.Linear(32, 16, dtype=torch.bfloat16)
        x = torch.ones((2, 3, 32), dtype=torch.bfloat16)
        with torch.no_grad():
            difference = PrepackedLinear(linear)(x).float() - F.linear(x, linear.weight, linear.bias).float()
        return bool(difference.abs().max() < 0.1)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        # The operators are torch's own but not public: without them the plain layout still computes the same.
        return False


def weights_bytes(decoder: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once, packed layouts included."""
    sizes: dict[object, int] = {}
    for module in decoder.modules():
        if isinstance(module, PrepackedLinear):
            sizes[id(module)] = module.num_bytes
            continue
        for tensor in _own_tensors(module):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr() or id(tensor)] = storage.nbytes()
    return sum(sizes.values())


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def joinable(*linears: Any) -> bool:
    return all(type(linear) is nn.Linear for linear in linears) and (
        len({(linear.weight.dtype, linear.bias is None) for linear in linears}) == 1
    )


def joined(linears: list[nn.Linear]) -> nn.Linear:
    """One linear whose outputs are those of `linears`, one after the other."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    whole.weight = nn.Parameter(weight, requires_grad=False)
    if linears[0].bias is not None:
        whole.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in linears]), requires_grad=False)
    return whole


def _prepack_children(module: nn.Module) -> int:
    count = 0
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16:
            setattr(module, name, PrepackedLinear(child))
            count += 1
    return count
