"""Tiny models for the compress room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.loading import save_decoder


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    """A random Llama whose sizes nothing divides unless asked for others; weights large enough to matter."""

    def make(*, hidden: int = 40, inner: int = 52, layers: int = 2, tied: bool = True, bias: bool = False) -> Decoder:
        config = ModelConfig(
            family="llama",
            vocab_size=96,
            hidden_size=hidden,
            intermediate_size=inner,
            num_layers=layers,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            rotary_dim=8,
            qkv_bias=bias,
            o_bias=bias,
            mlp_bias=bias,
            tie_word_embeddings=tied,
        )
        decoder = Decoder(config, dtype=torch.float32).initialize(std=0.15, seed=1)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in decoder.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0.0, 0.1, generator=generator)
        return decoder.eval()

    return make


@pytest.fixture
def examples() -> list[list[int]]:
    """Calibration token ids of uneven lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 96, (length,), generator=generator).tolist() for length in (50, 7, 64, 33, 20, 64, 1, 41)]


@pytest.fixture
def decoder_folder(make_decoder: Callable[..., Decoder], tmp_path: Path) -> Path:
    """A saved dense decoder."""
    folder = tmp_path / "parent"
    save_decoder(make_decoder(), folder, source=None)
    return folder
