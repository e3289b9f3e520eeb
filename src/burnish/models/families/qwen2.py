"""Qwen 2 and 2.5: Llama with biases on q, k and v, and windows in the upper layers when asked. arXiv:2407.10671."""

from __future__ import annotations

from typing import Any

from burnish.models.config import ModelConfig
from burnish.models.families.family import (
    Family,
    HFConfig,
    get,
    largest_window,
    layer_types,
    layer_windows,
    llama_rules,
    rotary_from_hf,
    token_ids,
)
from burnish.models.families.llama import IGNORED, gated_rmsnorm_fields, gated_rmsnorm_to_hf
from burnish.models.weight_map import WeightMap


def upper_layer_windows(hf: HFConfig, num_layers: int) -> dict[str, Any]:
    """Windows from "use_sliding_window", "sliding_window", "max_window_layers" and "layer_types"."""
    window = hf.get("sliding_window", 4096) if get(hf, "use_sliding_window", False) else None
    first = get(hf, "max_window_layers", 28)
    default = tuple(window if layer >= first else None for layer in range(num_layers))
    return layer_windows({**hf, "sliding_window": window}, num_layers, default=default)


def windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    """What `upper_layer_windows` reads."""
    window = largest_window(config)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": sum(config.window(layer) is None for layer in range(config.num_layers)),
        "layer_types": layer_types(config),
    }


def _config_from_hf(hf: HFConfig) -> ModelConfig:
    fields = gated_rmsnorm_fields(hf)
    return ModelConfig(
        family=FAMILY.name,
        **fields,
        **rotary_from_hf(hf, head_dim=fields["head_dim"]),
        **upper_layer_windows(hf, fields["num_layers"]),
        qkv_bias=True,
        tie_word_embeddings=bool(get(hf, "tie_word_embeddings", False)),
        **token_ids(hf),
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **gated_rmsnorm_to_hf(config),
        **windows_to_hf(config),
    }


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    weight_map=lambda config: WeightMap(llama_rules(config), ignored=IGNORED),
)
