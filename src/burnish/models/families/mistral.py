"""Mistral: Llama with a sliding window. Jiang et al., 2023, arXiv:2310.06825."""

from __future__ import annotations

from typing import Any

from burnish.models.config import ModelConfig
from burnish.models.families.family import Family, HFConfig, get, llama_rules, rotary_from_hf, token_ids
from burnish.models.families.llama import IGNORED, gated_rmsnorm_fields, gated_rmsnorm_to_hf
from burnish.models.weight_map import WeightMap


def _config_from_hf(hf: HFConfig) -> ModelConfig:
    fields = gated_rmsnorm_fields(hf, num_kv_heads=8)
    return ModelConfig(
        family=FAMILY.name,
        **fields,
        **rotary_from_hf(hf, head_dim=fields["head_dim"]),
        # A missing key means the class's 4096, null means no window.
        sliding_window=hf.get("sliding_window", 4096),
        tie_word_embeddings=bool(get(hf, "tie_word_embeddings", False)),
        **token_ids(hf, bos=1, eos=2),
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **gated_rmsnorm_to_hf(config),
        "sliding_window": config.sliding_window,
    }


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    weight_map=lambda config: WeightMap(llama_rules(config), ignored=IGNORED),
)
