"""Falcon in its three forms. Almazrouei et al., 2023, arXiv:2311.16867.

7B: one kv head, parallel residual with one norm. 40B and 180B ("new_decoder_architecture"): grouped q/k/v, parallel
residual with a norm each (one in the 11B). RW: ALiBi, a kv head per query head, sequential residual, biases.
"""

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
    rotary_from_hf,
    token_ids,
    token_ids_to_hf,
)
from burnish.models.weight_map import Rows, Rule, WeightMap


def _config_from_hf(hf: HFConfig) -> ModelConfig:
    hidden, num_heads = need(hf, "n_embed", "hidden_size"), need(hf, "num_attention_heads", "n_head")
    head_dim = hidden // num_heads
    grouped = bool(get(hf, "new_decoder_architecture", False))
    parallel = grouped or bool(get(hf, "parallel_attn", True))
    num_norms = get(hf, "num_ln_in_parallel_attn", 2 if grouped else 1)
    if not grouped and num_norms != 1:
        raise CheckpointError("config.json sets num_ln_in_parallel_attn without new_decoder_architecture")
    ungrouped_heads = 1 if get(hf, "multi_query", True) else num_heads
    num_kv_heads = get(hf, "num_kv_heads", num_heads) if grouped else ungrouped_heads
    bias = bool(get(hf, "bias", False))
    if get(hf, "alibi", False):
        # Scores and bias are summed before the division by sqrt(head_dim), and the bias is made in bfloat16.
        position = {"position": "alibi", "alibi_scale": head_dim**-0.5, "alibi_bfloat16": True}
    else:
        position = rotary_from_hf(hf, head_dim=head_dim)
    return ModelConfig(
        family=FAMILY.name,
        vocab_size=need(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=get(hf, "ffn_hidden_size", 4 * hidden),
        num_layers=need(hf, "num_hidden_layers", "n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=get(hf, "max_position_embeddings", 2048),
        norm="layernorm",
        norm_eps=get(hf, "layer_norm_epsilon", 1e-5),
        **position,
        mlp="plain",
        activation=activation_from_hf(get(hf, "activation", "gelu")),
        parallel_residual=parallel,
        shared_norm=parallel and num_norms == 1,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=bool(get(hf, "tie_word_embeddings", True)),
        **token_ids(hf, bos=11, eos=11),
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    per_head = config.num_kv_heads in (1, config.num_heads)
    grouped = not per_head or (config.parallel_residual and not config.shared_norm)
    record = {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "activation": activation_to_hf(config.activation),
        "alibi": config.position == "alibi",
        "new_decoder_architecture": grouped,
        "multi_query": config.num_kv_heads == 1,
        "parallel_attn": config.parallel_residual,
        "bias": config.qkv_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        **token_ids_to_hf(config),
    }
    if grouped:
        record["num_ln_in_parallel_attn"] = 1 if config.shared_norm else 2
    if config.position == "rotary":
        record["rope_theta"] = config.rope_theta
        record["rope_scaling"] = None if config.rope_scaling is None else dict(config.rope_scaling)
    return record


def _weight_map(config: ModelConfig) -> WeightMap:
    old, new = "transformer.h.{i}", "model.layers.{i}"
    head, groups = config.head_dim, config.num_kv_heads
    two_norms = config.parallel_residual and not config.shared_norm
    first, second = ("ln_attn", "ln_mlp") if two_norms else ("input_layernorm", "post_attention_layernorm")
    rules = [
        Rule(source="transformer.word_embeddings", targets=("model.embed_tokens",)),
        Rule(source=f"{old}.{first}", targets=(f"{new}.input_layernorm",)),
        Rule(
            source=f"{old}.self_attention.query_key_value",
            targets=tuple(f"{new}.self_attn.{name}_proj" for name in "qkv"),
            rows=Rows(groups, ((0, config.num_heads // groups * head), (1, head), (2, head))),
        ),
        Rule(source=f"{old}.self_attention.dense", targets=(f"{new}.self_attn.o_proj",)),
        Rule(source=f"{old}.mlp.dense_h_to_4h", targets=(f"{new}.mlp.up_proj",)),
        Rule(source=f"{old}.mlp.dense_4h_to_h", targets=(f"{new}.mlp.down_proj",)),
        Rule(source="transformer.ln_f", targets=("model.norm",)),
        Rule(source="lm_head", targets=("lm_head",)),
    ]
    if not config.shared_norm:
        rules.append(Rule(source=f"{old}.{second}", targets=(f"{new}.post_attention_layernorm",)))
    return WeightMap(rules, prefix="transformer.")


FAMILY = Family(
    name="falcon",
    architectures=("FalconForCausalLM",),
    model_types=("falcon",),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    weight_map=_weight_map,
)
