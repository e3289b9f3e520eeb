"""An empty decoder for one process's part of a model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from burnish.models.attention import spec_of_layer
from burnish.models.config import ModelConfig
from burnish.models.decoder import Block, Decoder
from burnish.models.shard_cut import ShardCut


class Elsewhere(nn.Module):
    """Stands where another process has a block, so that those that are here keep their numbers."""

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        return x


def empty_part(config: ModelConfig, cut: ShardCut, *, dtype: torch.dtype) -> Decoder:
    """A decoder on the meta device whose modules have this part's shapes; its `config` is the part's."""
    decoder = Decoder(cut.config(config), device="meta", dtype=dtype).eval()
    trunk = decoder.model
    for layer in range(config.num_layers):
        if not cut.layers[0] <= layer < cut.layers[1]:
            trunk.layers[layer] = Elsewhere()
            continue
        block = trunk.layers[layer]
        assert isinstance(block, Block)
        whole = spec_of_layer(config, layer)
        slopes_H = whole.alibi_slopes_H
        block.self_attn.spec = replace(
            whole,
            num_heads=decoder.config.num_heads,
            num_kv_heads=decoder.config.num_kv_heads,
            alibi_slopes_H=None if slopes_H is None else slopes_H[slice(*cut.heads)].contiguous(),
            _slopes_by_device={},
        )
    if trunk.embed_positions is not None:
        rows = cut.positions[1] - cut.positions[0]
        trunk.embed_positions = nn.Embedding(
            rows, config.hidden_size, _weight=torch.empty(rows, config.hidden_size, device="meta", dtype=dtype)
        )
    return decoder
