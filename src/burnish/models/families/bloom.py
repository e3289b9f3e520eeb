"""Bloom: ALiBi, a norm on the embeddings, q/k/v interleaved per head. arXiv:2211.05100."""

from __future__ import annotations

from typing import Any

from burnish.models.config import ModelConfig
from burnish.models.families.family import Family, HFConfig, get, need, token_ids, token_ids_to_hf
from burnish.models.weight_map import Rows, Rule, WeightMap


def _config_from_hf(hf: HFConfig) -> ModelConfig:
    hidden, num_heads = need(hf, "n_embed", "hidden_size"), need(hf, "n_head", "num_attention_heads")
    return ModelConfig(
        family=FAMILY.name,
        vocab_size=need(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=need(hf, "n_layer", "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden // num_heads,
        # Only the length it was trained at; ALiBi itself has no limit.
        max_position_embeddings=get(hf, "seq_length", 2048),
        norm="layernorm",
        norm_eps=get(hf, "layer_norm_epsilon", 1e-5),
        position="alibi",
        mlp="plain",
        activation="gelu_tanh",
        residual_from_norm=bool(get(hf, "apply_residual_connection_post_layernorm", False)),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        embedding_norm=True,
        tie_word_embeddings=bool(get(hf, "tie_word_embeddings", True)),
        **token_ids(hf, bos=1, eos=2),
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "seq_length": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "apply_residual_connection_post_layernorm": config.residual_from_norm,
        "tie_word_embeddings": config.tie_word_embeddings,
        **token_ids_to_hf(config),
    }


def _weight_map(config: ModelConfig) -> WeightMap:
    old, new = "transformer.h.{i}", "model.layers.{i}"
    head = config.head_dim
    return WeightMap(
        [
            Rule(source="transformer.word_embeddings", targets=("model.embed_tokens",)),
            Rule(source="transformer.word_embeddings_layernorm", targets=("model.embed_norm",)),
            Rule(source=f"{old}.input_layernorm", targets=(f"{new}.input_layernorm",)),
            Rule(
                source=f"{old}.self_attention.query_key_value",
                targets=tuple(f"{new}.self_attn.{name}_proj" for name in "qkv"),
                rows=Rows(config.num_heads, ((0, head), (1, head), (2, head))),
            ),
            Rule(source=f"{old}.self_attention.dense", targets=(f"{new}.self_attn.o_proj",)),
            Rule(source=f"{old}.post_attention_layernorm", targets=(f"{new}.post_attention_layernorm",)),
            Rule(source=f"{old}.mlp.dense_h_to_4h", targets=(f"{new}.mlp.up_proj",)),
            Rule(source=f"{old}.mlp.dense_4h_to_h", targets=(f"{new}.mlp.down_proj",)),
            Rule(source="transformer.ln_f", targets=("model.norm",)),
            Rule(source="lm_head", targets=("lm_head",)),
        ],
        prefix="transformer.",
    )


FAMILY = Family(
    name="bloom",
    architectures=("BloomForCausalLM",),
    model_types=("bloom",),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    weight_map=_weight_map,
)
