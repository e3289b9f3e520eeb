"""Qwen 3 (dense): Qwen 2 with normed queries and keys instead of biases. arXiv:2505.09388."""

from __future__ import annotations

from typing import Any

from burnish.models.config import ModelConfig
from burnish.models.families.family import Family, HFConfig, get, llama_rules, rotary_from_hf, token_ids
from burnish.models.families.llama import IGNORED, gated_rmsnorm_fields, gated_rmsnorm_to_hf
from burnish.models.families.qwen2 import upper_layer_windows, windows_to_hf
from burnish.models.weight_map import WeightMap


def _config_from_hf(hf: HFConfig) -> ModelConfig:
    fields = gated_rmsnorm_fields(hf, head_dim=128)
    bias = bool(get(hf, "attention_bias", False))
    return ModelConfig(
        family=FAMILY.name,
        **fields,
        **rotary_from_hf(hf, head_dim=fields["head_dim"]),
        **upper_layer_windows(hf, fields["num_layers"]),
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        tie_word_embeddings=bool(get(hf, "tie_word_embeddings", False)),
        **token_ids(hf),
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **gated_rmsnorm_to_hf(config),
        **windows_to_hf(config),
        "attention_bias": config.qkv_bias,
    }


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    weight_map=lambda config: WeightMap(llama_rules(config), ignored=IGNORED),
)
