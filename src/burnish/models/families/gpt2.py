"""GPT-2: learned positions, layer norms, linears stored (in, out). Radford et al., 2019."""

from __future__ import annotations

from typing import Any

from burnish.errors import CheckpointError
from burnish.models.config import ModelConfig
from burnish.models.families.family import (
    Family,
    HFConfig,
    activation_from_hf,
    activation_to_hf,
    get,
    need,
    token_ids,
    token_ids_to_hf,
)
from burnish.models.weight_map import Rows, Rule, WeightMap


def _config_from_hf(hf: HFConfig) -> ModelConfig:
    if hf.get("add_cross_attention"):
        raise CheckpointError("config.json asks for cross attention", remedy="burnish runs decoder-only models.")
    hidden, num_heads = need(hf, "n_embd", "hidden_size"), need(hf, "n_head", "num_attention_heads")
    return ModelConfig(
        family=FAMILY.name,
        vocab_size=need(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=get(hf, "n_inner", 4 * hidden),
        num_layers=need(hf, "n_layer", "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden // num_heads,
        max_position_embeddings=need(hf, "n_positions", "max_position_embeddings"),
        norm="layernorm",
        norm_eps=get(hf, "layer_norm_epsilon", 1e-5),
        position="learned",
        mlp="plain",
        activation=activation_from_hf(get(hf, "activation_function", "gelu_new")),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        attention_scale=None if get(hf, "scale_attn_weights", True) else 1.0,
        scale_by_layer=bool(get(hf, "scale_attn_by_inverse_layer_idx", False)),
        tie_word_embeddings=bool(get(hf, "tie_word_embeddings", True)),
        **token_ids(hf, bos=50256, eos=50256),
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_position_embeddings,
        "n_ctx": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, activation_to_hf(config.activation)),
        "scale_attn_weights": config.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
        "tie_word_embeddings": config.tie_word_embeddings,
        **token_ids_to_hf(config),
    }


def _weight_map(config: ModelConfig) -> WeightMap:
    old, new = "transformer.h.{i}", "model.layers.{i}"
    rows = config.num_heads * config.head_dim
    return WeightMap(
        [
            Rule(source="transformer.wte", targets=("model.embed_tokens",)),
            Rule(source="transformer.wpe", targets=("model.embed_positions",)),
            Rule(source=f"{old}.ln_1", targets=(f"{new}.input_layernorm",)),
            Rule(
                source=f"{old}.attn.c_attn",
                targets=tuple(f"{new}.self_attn.{name}_proj" for name in "qkv"),
                rows=Rows(1, ((0, rows), (1, rows), (2, rows))),
                transposed=True,
            ),
            Rule(source=f"{old}.attn.c_proj", targets=(f"{new}.self_attn.o_proj",), transposed=True),
            Rule(source=f"{old}.ln_2", targets=(f"{new}.post_attention_layernorm",)),
            Rule(source=f"{old}.mlp.c_fc", targets=(f"{new}.mlp.up_proj",), transposed=True),
            Rule(source=f"{old}.mlp.c_proj", targets=(f"{new}.mlp.down_proj",), transposed=True),
            Rule(source="transformer.ln_f", targets=("model.norm",)),
            Rule(source="lm_head", targets=("lm_head",)),
        ],
        prefix="transformer.",
        ignored=(r"\.attn\.bias$", r"\.attn\.masked_bias$"),
    )


FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    weight_map=_weight_map,
)
