"""Parameter counts and weight bytes against published figures."""

from __future__ import annotations

import pytest

from burnish.errors import ConfigError
from burnish.models.config import ModelConfig
from burnish.models.hf_config import config_of
from burnish.models.shapes import SHAPES
from burnish.plan.weights import (
    adapter_parameters,
    block_linears,
    kv_bytes,
    running_bytes,
    weight_bytes,
)

MIB = 2**20


def shape(name: str) -> ModelConfig:
    return config_of(SHAPES[name])


def small(**changes: object) -> ModelConfig:
    record: dict[str, object] = {
        "family": "llama",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rotary_dim": 32,
    }
    return ModelConfig.from_dict({**record, **changes})


@pytest.mark.parametrize(
    ("name", "millions"),
    [("bloom-1b1", 1065.3), ("bloom-7b1", 7069.0), ("falcon-7b", 6921.7), ("codegen2-1b", 1015.3)],
)
def test_parameters_equal_published_counts(name: str, millions: float) -> None:
    assert round(shape(name).num_parameters() / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "published_mib", "mask_mib"),
    # The published CodeGen2 figure includes the causal masks that model keeps: 16 layers of 2048 x 2048 bytes.
    [("bloom-1b1", 4063.9, 0), ("bloom-7b1", 26966.2, 0), ("falcon-7b", 26404.3, 0), ("codegen2-1b", 3937.1, 64)],
)
def test_float32_bytes_equal_published_memory(name: str, published_mib: float, mask_mib: float) -> None:
    assert weight_bytes(shape(name), "float32").total / MIB + mask_mib == pytest.approx(published_mib, abs=0.06)


@pytest.mark.parametrize(
    ("name", "published_mib"), [("bloom-1b1", 1400.1), ("bloom-7b1", 7861.4), ("falcon-7b", 7038.3)]
)
def test_gptq_8_bit_bytes_equal_published_memory(name: str, published_mib: float) -> None:
    assert weight_bytes(shape(name), "int8").total / MIB == pytest.approx(published_mib, rel=3e-4)


@pytest.mark.parametrize(
    ("name", "weight_format", "published_mib"), [("bloom-7b1", "nf4", 4843.1), ("falcon-7b", "int8", 6883.1)]
)
def test_quantized_bytes_without_scales_equal_published_memory(
    name: str, weight_format: str, published_mib: float
) -> None:
    sizes = weight_bytes(shape(name), weight_format)
    assert (sizes.packed + sizes.dense) / MIB == pytest.approx(published_mib, abs=0.06)
    assert sizes.scales > 0


def test_group_layout_counts_partial_groups_and_words() -> None:
    config = small(num_layers=1, num_kv_heads=4)
    sizes = weight_bytes(config, "int4", group_size=100)
    linears = block_linears(config)
    assert sizes.packed == sum(rows * columns for rows, columns in linears) // 2
    expected = sum(-(-columns // 100) * (2 * rows + rows // 2) + 4 * columns for rows, columns in linears)
    assert sizes.scales == expected
    assert sizes.dense == 2 * (config.num_parameters() - 2 * sizes.packed)


def test_running_4_bit_weights_take_a_byte_each() -> None:
    config = small()
    weights = sum(rows * columns for rows, columns in block_linears(config))
    assert running_bytes(config, "int4") > weights
    assert running_bytes(config, "int4") == running_bytes(config, "int8")
    assert running_bytes(config, "float32") == 4 * config.num_parameters()


def test_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="int3"):
        weight_bytes(small(), "int3")


def test_kv_of_windowed_layers_stops_at_the_window() -> None:
    full = small()
    mixed = small(layer_windows=[None, 64, 64])
    per_layer = 2 * 2 * 32 * 2
    assert kv_bytes(full, tokens=256, bytes_per_element=2) == 3 * 256 * per_layer
    assert kv_bytes(mixed, tokens=256, bytes_per_element=2) == (256 + 64 + 64) * per_layer
    assert kv_bytes(full, tokens=1, bytes_per_element=2) == full.kv_bytes_per_token(2)


def test_adapter_parameters_follow_roles() -> None:
    config = small()
    assert adapter_parameters(config, rank=8, target_modules=("q_proj",)) == 3 * 8 * (128 + 128)
    everything = 8 * sum(rows + columns for rows, columns in block_linears(config))
    assert adapter_parameters(config, rank=8) == everything


def test_adapter_on_unknown_role_is_refused() -> None:
    with pytest.raises(ConfigError, match="query"):
        adapter_parameters(small(), rank=8, target_modules=("query",))
