"""What makes a decoder's part work with the other parts: sums after cut inputs, and embeddings of some rows.

Shapes: B sequences, T tokens, D hidden, I in features, O out features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.compress.int8_linear import LARGEST, Int8Linear
from burnish.engine.packing import pack_decoder
from burnish.engine.shard_group import ShardGroup
from burnish.kernels.reference import integer_product
from burnish.models.decoder import Block, Decoder
from burnish.models.shard_cut import ShardCut, Span


class RowsOfEmbedding(nn.Module):
    """Some rows of an embedding: zeros for every other id, so that the parts' sum is the whole's."""

    def __init__(self, embedding: nn.Embedding, rows: Span) -> None:
        super().__init__()
        self.weight = embedding.weight
        self._begin, self._end = rows

    def forward(self, ids_BT: Tensor) -> Tensor:
        """(B, T) ids of the whole to (B, T, D)."""
        here_BT = (ids_BT >= self._begin) & (ids_BT < self._end)
        x_BTD = F.embedding((ids_BT - self._begin).where(here_BT, 0), self.weight)
        return x_BTD.masked_fill_(~here_BT[..., None], 0)


class SummedLinear(nn.Module):
    """A linear that holds some of the inputs: the parts' products are summed, then the bias is added once."""

    def __init__(self, part: nn.Module, bias_O: Tensor | None, group: ShardGroup) -> None:
        super().__init__()
        self.part = part
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach(), requires_grad=False)
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        y = self._group.sum_stage(self.part(x))
        return y if self.bias is None else y + self.bias


class SummedInt8Linear(nn.Module):
    """As `SummedLinear`, of an `Int8Linear`: all parts round a token by the whole token's largest magnitude."""

    def __init__(self, part: Int8Linear, bias_O: Tensor | None, group: ShardGroup) -> None:
        super().__init__()
        self.part = part
        self.bias = None if bias_O is None else nn.Parameter(bias_O.detach(), requires_grad=False)
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        x_TI = x.reshape(-1, self.part.in_features).float()
        peak_T = x_TI.abs().amax(dim=1)
        # Not every way of taking the largest keeps a NaN.
        scale_T = self._group.max_stage(peak_T.nan_to_num(nan=torch.inf, posinf=torch.inf)) / LARGEST
        finite_T = torch.isfinite(scale_T)
        step_T = torch.where(scale_T > 0, scale_T, 1.0)
        ints_TI = (x_TI / step_T[:, None]).round_().clamp_(-LARGEST, LARGEST)
        ints_TI = torch.where(finite_T[:, None], ints_TI, 0.0).to(torch.int8)
        y_TO = self._group.sum_stage(integer_product(ints_TI, self.part.weight))
        y_TO = y_TO.mul_(self.part.weight_scale).mul_(torch.where(finite_T, scale_T, torch.nan)[:, None])
        if self.bias is not None:
            y_TO += self.bias
        return y_TO.to(x.dtype).view(*x.shape[:-1], self.part.out_features)


def connect(decoder: Decoder, cut: ShardCut, group: ShardGroup) -> int:
    """Join a loaded part to the others, in place; its linears are laid out for running.

    Returns:
        How many modules were laid out; see `pack_decoder`.
    """
    trunk = decoder.model
    trunk.embed_tokens = RowsOfEmbedding(trunk.embed_tokens, cut.vocab)  # type: ignore[assignment]
    if trunk.embed_positions is not None:
        trunk.embed_positions = RowsOfEmbedding(trunk.embed_positions, cut.positions)  # type: ignore[assignment]
    if cut.tensor_parallel == 1:
        return pack_decoder(decoder)
    cut_linears = [
        (module, name)
        for block in trunk.layers
        if isinstance(block, Block)
        for module, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj"))
    ]
    biases = []
    for module, name in cut_linears:
        linear = getattr(module, name)
        biases.append(linear.bias)
        linear.bias = None
    # Packing replaces the modules around these linears, and the linears themselves.
    layers = [layer for layer, block in enumerate(trunk.layers) if isinstance(block, Block)]
    packed = pack_decoder(decoder)
    owners = [owner for layer in layers for owner in (trunk.layers[layer].self_attn, trunk.layers[layer].mlp)]
    for owner, (_, name), bias_O in zip(owners, cut_linears, biases):
        part = getattr(owner, name)
        summed = SummedInt8Linear if isinstance(part, Int8Linear) else SummedLinear
        setattr(owner, name, summed(part, bias_O, group))
    return packed
