"""Gemma 2 and the text models of Gemma 3. arXiv:2408.00118 and arXiv:2503.19786.

Both norm attention's and MLP's outputs as well, store norm weights as their difference from 1, scale the embeddings
and alternate layers with and without a window. Gemma 2 bounds scores and logits; Gemma 3 norms queries and keys, and
rotates its windowed layers with another base.
"""

from __future__ import annotations

import math
from typing import Any

from burnish.errors import CheckpointError
from burnish.models.config import ModelConfig
from burnish.models.families.family import (
    Family,
    HFConfig,
    activation_from_hf,
    activation_to_hf,
    get,
    largest_window,
    layer_types,
    layer_windows,
    llama_rules,
    need,
    rope_parameters,
    rope_scaling,
    rotary_from_hf,
    token_ids,
)
from burnish.models.families.llama import IGNORED, gated_rmsnorm_fields, gated_rmsnorm_to_hf
from burnish.models.weight_map import Rule, WeightMap


def _common_fields(hf: HFConfig, *, every: int) -> dict[str, Any]:
    if hf.get("use_bidirectional_attention"):
        raise CheckpointError("config.json asks for bidirectional attention", remedy="Try --engine transformers.")
    fields = gated_rmsnorm_fields(hf, head_dim=256, num_kv_heads=4)
    fields["activation"] = activation_from_hf(get(hf, "hidden_activation", "gelu_pytorch_tanh"))
    bias = bool(get(hf, "attention_bias", False))
    window = hf.get("sliding_window", 4096)
    default = tuple(window if (layer + 1) % every else None for layer in range(fields["num_layers"]))
    return {
        **fields,
        **layer_windows({**hf, "sliding_window": window}, fields["num_layers"], default=default),
        **token_ids(hf, bos=2, eos=1),
        "norm_weight_offset": 1.0,
        "output_norms": True,
        "embedding_scale": math.sqrt(need(hf, "hidden_size")),
        "attention_scale": get(hf, "query_pre_attn_scalar", 256) ** -0.5,
        "qkv_bias": bias,
        "o_bias": bias,
        "tie_word_embeddings": bool(get(hf, "tie_word_embeddings", True)),
    }


def _gemma2_from_hf(hf: HFConfig) -> ModelConfig:
    fields = _common_fields(hf, every=2)
    return ModelConfig(
        family=GEMMA2.name,
        **fields,
        **rotary_from_hf(hf, head_dim=fields["head_dim"]),
        attention_softcap=hf.get("attn_logit_softcapping", 50.0),
        logit_softcap=hf.get("final_logit_softcapping", 30.0),
    )


def _gemma3_from_hf(hf: HFConfig) -> ModelConfig:
    if hf.get("attn_logit_softcapping") is not None:
        raise CheckpointError(
            "config.json sets attn_logit_softcapping, which transformers ignores in Gemma 3",
            got=hf["attn_logit_softcapping"],
            expected="null",
        )
    fields = _common_fields(hf, every=get(hf, "sliding_window_pattern", 6))
    whole = rope_parameters(hf, "full_attention")
    local = {"rope_theta": get(hf, "rope_local_base_freq", 10000.0), "rope_type": "default"}
    if isinstance((hf.get("rope_parameters") or {}).get("sliding_attention"), dict):
        local = {**local, **rope_parameters(hf, "sliding_attention")}
    return ModelConfig(
        family=GEMMA3.name,
        **fields,
        position="rotary",
        rotary_dim=fields["head_dim"],
        rope_theta=float(get(whole, "rope_theta", 1_000_000.0)),
        rope_scaling=rope_scaling(hf, whole),
        local_rope_theta=float(local["rope_theta"]),
        local_rope_scaling=rope_scaling(hf, local),
        qk_norm=True,
        logit_softcap=hf.get("final_logit_softcapping"),
    )


def _common_to_hf(config: ModelConfig) -> dict[str, Any]:
    record = gated_rmsnorm_to_hf(config)
    del record["hidden_act"]
    assert config.attention_scale is not None
    return {
        **record,
        "hidden_activation": activation_to_hf(config.activation),
        "sliding_window": largest_window(config),
        "layer_types": layer_types(config),
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "attention_bias": config.qkv_bias,
        "final_logit_softcapping": config.logit_softcap,
        "attn_logit_softcapping": config.attention_softcap,
    }


def _gemma2_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **_common_to_hf(config)}


def _gemma3_to_hf(config: ModelConfig) -> dict[str, Any]:
    whole, local = dict(config.rope_scaling or {}), dict(config.local_rope_scaling or {})
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **_common_to_hf(config),
        "rope_local_base_freq": config.local_rope_theta,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", **whole, "rope_theta": config.rope_theta},
            "sliding_attention": {"rope_type": "default", **local, "rope_theta": config.local_rope_theta},
        },
    }


_RENAMED = {
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}


def _weight_map(config: ModelConfig) -> WeightMap:
    rules = []
    for rule in llama_rules(config):
        parent, _, leaf = rule.source.rpartition(".")
        rules.append(Rule(source=f"{parent}.{_RENAMED.get(leaf, leaf)}" if parent else leaf, targets=rule.targets))
    return WeightMap(rules, ignored=IGNORED)


GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    config_from_hf=_gemma2_from_hf,
    config_to_hf=_gemma2_to_hf,
    weight_map=_weight_map,
)
GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    model_types=("gemma3_text",),
    config_from_hf=_gemma3_from_hf,
    config_to_hf=_gemma3_to_hf,
    weight_map=_weight_map,
)
