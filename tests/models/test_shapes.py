"""Shapes have the publishers' parameter counts."""

from __future__ import annotations

import pytest

from burnish.errors import ConfigError
from burnish.models.hf_config import config_of
from burnish.models.shapes import SHAPES, hf_config_of_shape

PUBLISHED = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "135m": 134_515_008,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "gpt2": 124_439_808,
    "pythia-160m": 162_322_944,
    "bloom-1b1": 1_065_314_304,
    "bloom-7b1": 7_069_016_064,
    "falcon-7b": 6_921_720_704,
    "codegen2-1b": 1_015_306_240,
}


def test_every_shape_has_its_published_count() -> None:
    assert {name: config_of(shape).num_parameters() for name, shape in SHAPES.items()} == PUBLISHED


def test_codegen2_has_eight_blocks() -> None:
    assert config_of(SHAPES["codegen2-1b"]).fused_qkv_blocks == 8


def test_unknown_shape_suggests_a_near_one() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean mistral-7b\?"):
        hf_config_of_shape("mistral7b")
