"""Linears are found in order and replaced by name; nothing to replace is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.errors import ConfigError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.linears import get_module, linear_names, replace_linears, set_module


@pytest.fixture
def decoder() -> Decoder:
    config = ModelConfig(
        family="llama",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_position_embeddings=32,
        rotary_dim=4,
    )
    return Decoder(config).initialize()


def test_linear_names_are_those_of_the_config_in_order(decoder: Decoder) -> None:
    assert linear_names(decoder) == list(decoder.config.linear_shapes())


def test_replacement_takes_the_place_of_the_linear(decoder: Decoder) -> None:
    class Doubled(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base(x)

    tokens_BT = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = decoder(tokens_BT)
        names = replace_linears(decoder, lambda name, linear: Doubled(linear) if name == "lm_head" else None)
        assert names == ["lm_head"]
        assert torch.equal(decoder(tokens_BT), 2 * before)
    assert "lm_head.base" in linear_names(decoder)


def test_no_match_raises_naming_the_roles(decoder: Decoder) -> None:
    with pytest.raises(ConfigError, match="q_proj"):
        replace_linears(decoder, lambda name, linear: None)


def test_unknown_name_raises(decoder: Decoder) -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.9"):
        get_module(decoder, "model.layers.9.mlp")
    with pytest.raises(ConfigError, match="nothing_here"):
        set_module(decoder, "nothing_here", nn.Identity())


def test_set_module_replaces_a_layer_of_the_list(decoder: Decoder) -> None:
    replacement = nn.Identity()
    set_module(decoder, "model.layers.1", replacement)
    assert get_module(decoder, "model.layers.1") is replacement
