"""Packing changes no result, frees what it replaces, and leaves everything but plain linears alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from burnish.engine.packing import (
    PackedAttention,
    PackedMLP,
    PrepackedLinear,
    pack_decoder,
    prepacking_works,
    weights_bytes,
)
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder

TOKENS_BT = torch.arange(3, 35).reshape(2, 16)


def test_packed_logits_equal_unpacked(tiny: Any) -> None:
    decoder = load_decoder(tiny.folder, dtype="float32")
    before_bytes = weights_bytes(decoder)
    with torch.no_grad():
        expected = decoder(TOKENS_BT)
        assert pack_decoder(decoder) >= len(decoder.model.layers)
        torch.testing.assert_close(decoder(TOKENS_BT), expected, rtol=1e-4, atol=1e-5)
    assert all(isinstance(block.self_attn, PackedAttention) for block in decoder.model.layers)
    assert weights_bytes(decoder) == before_bytes


def test_prepacked_bfloat16_equals_plain(tiny_model: Callable[[str], Any]) -> None:
    if not prepacking_works():
        pytest.skip("this processor or build of torch has no prepared bfloat16 layout")
    decoder = load_decoder(tiny_model("llama").folder, dtype="bfloat16")
    before_bytes = weights_bytes(decoder)
    with torch.no_grad():
        expected = decoder(TOKENS_BT).float()
        pack_decoder(decoder)
        difference = (decoder(TOKENS_BT).float() - expected).abs().max()
    assert difference < 0.05 * expected.abs().max()
    assert not any(isinstance(module, nn.Linear) for module in decoder.modules())
    assert weights_bytes(decoder) == before_bytes


def test_prepacked_linear_adds_its_bias() -> None:
    if not prepacking_works():
        pytest.skip("this processor or build of torch has no prepared bfloat16 layout")
    linear = nn.Linear(24, 7, dtype=torch.bfloat16)
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(PrepackedLinear(linear)(x), linear(x), rtol=0.02, atol=0.02)


class Replaced(nn.Module):
    """Stands for an adapter or a quantized linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 1.0


def test_replaced_linears_are_left_alone(decoder: Decoder) -> None:
    first, second = decoder.model.layers
    first.self_attn.k_proj = Replaced(first.self_attn.k_proj)
    second.mlp.up_proj = Replaced(second.mlp.up_proj)
    with torch.no_grad():
        expected = decoder(TOKENS_BT)
        assert pack_decoder(decoder) == 2
        torch.testing.assert_close(decoder(TOKENS_BT), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(first.self_attn.k_proj, Replaced)
    assert isinstance(first.mlp, PackedMLP)
    assert isinstance(second.self_attn, PackedAttention)
    assert isinstance(second.mlp.up_proj, Replaced)
