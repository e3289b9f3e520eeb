"""Llama 1 to 3 and the many models that share its class. Touvron et al., 2023, arXiv:2302.13971."""

from __future__ import annotations

from typing import Any

from burnish.models.config import ModelConfig
from burnish.models.families.family import (
    Family,
    HFConfig,
    activation_from_hf,
    activation_to_hf,
    get,
    llama_rules,
    need,
    rotary_from_hf,
    token_ids,
    token_ids_to_hf,
)
from burnish.models.weight_map import WeightMap

IGNORED = (r"rotary_emb\.inv_freq$",)


def gated_rmsnorm_fields(
    hf: HFConfig, *, head_dim: int | None = None, num_kv_heads: int | None = None
) -> dict[str, Any]:
    """The fields that Llama and its descendants read alike.

    Args:
        head_dim: where config.json has none: this, or hidden_size / num_attention_heads.
        num_kv_heads: where config.json does not mention it: this, or one per query head (which null means too).
    """
    num_heads = need(hf, "num_attention_heads")
    head_dim = get(hf, "head_dim", head_dim or need(hf, "hidden_size") // num_heads)
    return {
        "vocab_size": need(hf, "vocab_size"),
        "hidden_size": need(hf, "hidden_size"),
        "intermediate_size": need(hf, "intermediate_size"),
        "num_layers": need(hf, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": hf.get("num_key_value_heads", num_kv_heads) or num_heads,
        "head_dim": head_dim,
        "max_position_embeddings": get(hf, "max_position_embeddings", 2048),
        "norm": "rmsnorm",
        "norm_eps": get(hf, "rms_norm_eps", 1e-6),
        "mlp": "gated",
        "activation": activation_from_hf(get(hf, "hidden_act", "silu")),
    }


def gated_rmsnorm_to_hf(config: ModelConfig) -> dict[str, Any]:
    """What `gated_rmsnorm_fields`, `rotary_from_hf` and `token_ids` read."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": activation_to_hf(config.activation),
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        **token_ids_to_hf(config),
    }


def _config_from_hf(hf: HFConfig) -> ModelConfig:
    fields = gated_rmsnorm_fields(hf)
    bias = bool(get(hf, "attention_bias", False))
    return ModelConfig(
        family=FAMILY.name,
        **fields,
        **rotary_from_hf(hf, head_dim=fields["head_dim"]),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(get(hf, "mlp_bias", False)),
        tie_word_embeddings=bool(get(hf, "tie_word_embeddings", False)),
        **token_ids(hf, bos=1, eos=2),
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **gated_rmsnorm_to_hf(config),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def _weight_map(config: ModelConfig) -> WeightMap:
    return WeightMap(llama_rules(config), ignored=IGNORED)


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    model_types=("llama",),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    weight_map=_weight_map,
)
