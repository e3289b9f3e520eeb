"""Frequencies equal transformers' for every scaling and length; rotation keeps lengths and relative positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from burnish.models.rope import Rope

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-untruncated": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "truncate": False,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
    },
    "yarn-mscale": {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn-factor": {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
}


@pytest.mark.parametrize("name", sorted(SCALINGS))
@pytest.mark.parametrize("length", [10, 256, 300])
def test_frequencies_equal_transformers(name: str, length: int) -> None:
    kind = name.split("-")[0]
    scaling = {"rope_type": kind, **SCALINGS[name]}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={**scaling, "rope_theta": 5000.0},
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    rope = Rope(rotary_dim=16, theta=5000.0, max_position_embeddings=256, scaling=scaling)
    frequencies, factor = rope.frequencies(length)
    assert torch.allclose(frequencies, expected, rtol=1e-5)
    assert factor == pytest.approx(expected_factor)


@pytest.mark.parametrize("length", [10, 64, 65, 200])
def test_longrope_switches_at_the_trained_length(length: int) -> None:
    divisors = {"short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
    scaling = {"rope_type": "longrope", **divisors}
    config = Phi3Config(
        vocab_size=100,
        pad_token_id=0,
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=256,
        original_max_position_embeddings=64,
        rope_parameters={**scaling, "rope_theta": 5000.0},
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=length)
    scaling["original_max_position_embeddings"] = 64
    rope = Rope(rotary_dim=16, theta=5000.0, max_position_embeddings=256, scaling=scaling)
    frequencies, factor = rope.frequencies(length)
    assert torch.allclose(frequencies, expected, rtol=1e-5)
    assert factor == pytest.approx(expected_factor)
    table = rope.table(torch.arange(length)[None], dtype=torch.float32)
    angles = torch.arange(length)[:, None] * expected
    assert torch.allclose(table.cos[0, :, 0], angles.cos() * expected_factor, atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only(interleaved: bool) -> None:
    rope = Rope(rotary_dim=6, theta=100.0, max_position_embeddings=64, interleaved=interleaved)
    q_E, k_E = torch.randn(2, 10, generator=torch.Generator().manual_seed(0)).double()

    def score(query_position: int, key_position: int) -> float:
        table = rope.table(torch.tensor([[query_position, key_position]]), dtype=torch.float64)
        rotated = table.rotate(torch.stack((q_E, k_E))[None, :, None])[0, :, 0]
        return float(rotated[0] @ rotated[1])

    assert score(7, 3) == pytest.approx(score(24, 20), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)
    assert score(0, 0) == pytest.approx(float(q_E @ k_E), abs=1e-6)


def test_tables_of_far_positions_are_exact_in_bfloat16_models() -> None:
    rope = Rope(rotary_dim=8, theta=10000.0, max_position_embeddings=8192)
    table = rope.table(torch.tensor([[4097]]), dtype=torch.bfloat16)
    exact = torch.cos(torch.tensor(4097.0))
    assert table.cos.dtype == torch.bfloat16
    assert abs(float(table.cos[0, 0, 0, 0]) - float(exact)) < 0.01


def test_frequencies_cached_in_inference_mode_still_train() -> None:
    rope = Rope(rotary_dim=4, theta=10.0, max_position_embeddings=16)
    positions_BT = torch.arange(3)[None]
    with torch.inference_mode():
        rope.table(positions_BT, dtype=torch.float32)
    x = torch.randn(1, 3, 1, 4, requires_grad=True)
    rope.table(positions_BT, dtype=torch.float32).rotate(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_tokens_of_several_lengths_rotate_as_each_alone(name: str) -> None:
    scaling: dict[str, Any] = {"rope_type": name, "factor": 3.0}
    if name == "longrope":
        scaling |= {"original_max_position_embeddings": 8, "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
    rope = Rope(rotary_dim=4, theta=100.0, max_position_embeddings=8, scaling=scaling)
    positions_BT, lengths_BT = torch.tensor([[0, 1, 9, 3]]), torch.tensor([[5, 5, 10, 20]])
    table = rope.table(positions_BT, dtype=torch.float32, lengths_BT=lengths_BT)
    for place, (position, length) in enumerate(zip(positions_BT[0].tolist(), lengths_BT[0].tolist())):
        frequencies, factor = rope.frequencies(length)
        assert torch.allclose(table.cos[0, place, 0], (position * frequencies).cos() * factor)
        assert torch.allclose(table.sin[0, place, 0], (position * frequencies).sin() * factor)
