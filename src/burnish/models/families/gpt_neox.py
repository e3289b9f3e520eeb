"""GPT-NeoX and Pythia: partial rotary, parallel residual, two norms, q/k/v interleaved per head. arXiv:2204.06745."""

from __future__ import annotations

from typing import Any

from burnish.models.config import ModelConfig
from burnish.models.families.family import (
    Family,
    HFConfig,
    activation_from_hf,
    activation_to_hf,
    get,
    need,
    rotary_from_hf,
    token_ids,
    token_ids_to_hf,
)
from burnish.models.weight_map import Rows, Rule, WeightMap


def _config_from_hf(hf: HFConfig) -> ModelConfig:
    hidden, num_heads = need(hf, "hidden_size"), need(hf, "num_attention_heads")
    bias = bool(get(hf, "attention_bias", True))
    renamed = {"rope_theta": hf.get("rotary_emb_base"), "partial_rotary_factor": hf.get("rotary_pct")}
    return ModelConfig(
        family=FAMILY.name,
        vocab_size=need(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=need(hf, "intermediate_size"),
        num_layers=need(hf, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden // num_heads,
        max_position_embeddings=need(hf, "max_position_embeddings"),
        norm="layernorm",
        norm_eps=get(hf, "layer_norm_eps", 1e-5),
        **rotary_from_hf({**renamed, **hf}, head_dim=hidden // num_heads, fraction=0.25),
        mlp="plain",
        activation=activation_from_hf(get(hf, "hidden_act", "gelu")),
        parallel_residual=bool(get(hf, "use_parallel_residual", True)),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        tie_word_embeddings=bool(get(hf, "tie_word_embeddings", False)),
        **token_ids(hf, bos=0, eos=2),
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.norm_eps,
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rotary_dim / config.head_dim,
        "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
        "hidden_act": activation_to_hf(config.activation),
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        **token_ids_to_hf(config),
    }


def _weight_map(config: ModelConfig) -> WeightMap:
    old, new = "gpt_neox.layers.{i}", "model.layers.{i}"
    head = config.head_dim
    return WeightMap(
        [
            Rule(source="gpt_neox.embed_in", targets=("model.embed_tokens",)),
            Rule(source=f"{old}.input_layernorm", targets=(f"{new}.input_layernorm",)),
            Rule(source=f"{old}.post_attention_layernorm", targets=(f"{new}.post_attention_layernorm",)),
            Rule(
                source=f"{old}.attention.query_key_value",
                targets=tuple(f"{new}.self_attn.{name}_proj" for name in "qkv"),
                rows=Rows(config.num_heads, ((0, head), (1, head), (2, head))),
            ),
            Rule(source=f"{old}.attention.dense", targets=(f"{new}.self_attn.o_proj",)),
            Rule(source=f"{old}.mlp.dense_h_to_4h", targets=(f"{new}.mlp.up_proj",)),
            Rule(source=f"{old}.mlp.dense_4h_to_h", targets=(f"{new}.mlp.down_proj",)),
            Rule(source="gpt_neox.final_layer_norm", targets=("model.norm",)),
            Rule(source="embed_out", targets=("lm_head",)),
            Rule(source="lm_head", targets=("lm_head",)),
        ],
        prefix="gpt_neox.",
        ignored=(r"\.attention\.(bias|masked_bias)$", r"rotary_emb\.inv_freq$"),
    )


FAMILY = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    model_types=("gpt_neox",),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    weight_map=_weight_map,
)
