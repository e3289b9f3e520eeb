"""The config is plain data: it survives JSON, refuses nonsense, counts what it implies, and needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from burnish.errors import CheckpointError, ConfigError
from burnish.models.config import ModelConfig
from burnish.models.families.registry import family_for, family_named
from burnish.models.hf_config import config_of, load_config
from burnish.models.shapes import SHAPES

SMALL = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=32,
    rotary_dim=4,
)


def test_config_survives_json(tiny: Any) -> None:
    config = load_config(tiny.folder)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_config_survives_config_json_of_its_family(tiny: Any) -> None:
    config = load_config(tiny.folder)
    record = family_named(config.family).config_to_hf(config)
    assert config_of(json.loads(json.dumps(record))) == config


def test_unknown_key_raises() -> None:
    with pytest.raises(ConfigError, match="num_experts"):
        ModelConfig.from_dict({**SMALL.to_dict(), "num_experts": 8})


def test_missing_key_raises() -> None:
    record = SMALL.to_dict()
    del record["hidden_size"]
    with pytest.raises(ConfigError, match="hidden_size"):
        ModelConfig.from_dict(record)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0},
        {"num_kv_heads": 3},
        {"activation": "mish"},
        {"rotary_dim": 3},
        {"rotary_dim": 6},
        {"tie_word_embeddings": True, "lm_head_bias": True},
        {"rope_scaling": {"rope_type": "spiral"}},
        {"layer_windows": (4,)},
    ],
)
def test_nonsense_raises(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(SMALL, **change)


def test_windows_are_per_layer_when_given() -> None:
    assert [replace(SMALL, sliding_window=5).window(layer) for layer in (0, 1)] == [5, 5]
    windows = replace(SMALL, layer_windows=(None, 7))
    assert [windows.window(layer) for layer in (0, 1)] == [None, 7]


def test_kv_bytes_count_keys_and_values_of_all_layers() -> None:
    assert SMALL.kv_bytes_per_token(2) == 2 * 2 * 2 * 4 * 2


def test_unknown_family_raises() -> None:
    with pytest.raises(CheckpointError, match="unknown family"):
        family_named("rwkv")
    with pytest.raises(CheckpointError, match="model_type 'rwkv'"):
        family_for({"model_type": "rwkv"})


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_published_shape_reads(name: str) -> None:
    config = config_of(SHAPES[name])
    assert config.num_layers > 0
    assert config.eos_ids


def test_configs_and_families_need_no_torch() -> None:
    code = (
        "import sys, burnish.models.hf_config, burnish.models.shapes, burnish.models.weight_map\n"
        "from burnish.models.hf_config import config_of\n"
        "config_of(burnish.models.shapes.SHAPES['bloom-7b1']).num_parameters()\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
