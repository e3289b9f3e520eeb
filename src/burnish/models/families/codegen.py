"""CodeGen 1 and 2: interleaved partial rotary, parallel residual with one norm. arXiv:2203.13474, arXiv:2305.02309.

The fused projection holds (q, v, k) once per model-parallel block of the machine it was trained on: 4 blocks in
CodeGen 1, 8 in the CodeGen 2 models whose remote code says so. Both call their class CodeGenForCausalLM. The rule, from
config.json alone: "mp_num" when it is there (burnish writes it where it is not 4); else 8 when there is a "head_dim",
which only those CodeGen 2 configs have (the class computes it); else 4. Remote code is never run.
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
    token_ids,
    token_ids_to_hf,
)
from burnish.models.weight_map import Rows, Rule, WeightMap


def _config_from_hf(hf: HFConfig) -> ModelConfig:
    hidden, num_heads = need(hf, "n_embd", "hidden_size"), need(hf, "n_head", "num_attention_heads")
    blocks = get(hf, "mp_num", 4 if hf.get("head_dim") is None else 8)
    if num_heads % blocks:
        raise CheckpointError(
            "config.json's heads do not divide into the blocks of its fused projection",
            got=f"{num_heads} heads",
            expected=f"a multiple of {blocks}",
        )
    return ModelConfig(
        family=FAMILY.name,
        vocab_size=need(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=get(hf, "n_inner", 4 * hidden),
        num_layers=need(hf, "n_layer", "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden // num_heads,
        max_position_embeddings=get(hf, "n_positions", 2048),
        norm="layernorm",
        norm_eps=get(hf, "layer_norm_epsilon", 1e-5),
        position="rotary",
        rotary_dim=get(hf, "rotary_dim", 64),
        rotary_interleaved=True,
        mlp="plain",
        activation=activation_from_hf(get(hf, "activation_function", "gelu_new")),
        parallel_residual=True,
        shared_norm=True,
        mlp_bias=True,
        lm_head_bias=True,
        tie_word_embeddings=bool(get(hf, "tie_word_embeddings", False)),
        fused_qkv_blocks=blocks,
        **token_ids(hf, bos=50256, eos=50256),
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    record = {
        "architectures": ["CodeGenForCausalLM"],
        "model_type": "codegen",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_position_embeddings,
        "n_ctx": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "rotary_dim": config.rotary_dim,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.activation, activation_to_hf(config.activation)),
        "tie_word_embeddings": config.tie_word_embeddings,
        **token_ids_to_hf(config),
    }
    if config.fused_qkv_blocks != 4:
        record |= {"mp_num": config.fused_qkv_blocks, "head_dim": config.head_dim}
    return record


def _weight_map(config: ModelConfig) -> WeightMap:
    old, new = "transformer.h.{i}", "model.layers.{i}"
    blocks = config.fused_qkv_blocks
    rows = config.num_heads * config.head_dim // blocks
    return WeightMap(
        [
            Rule(source="transformer.wte", targets=("model.embed_tokens",)),
            Rule(source=f"{old}.ln_1", targets=(f"{new}.input_layernorm",)),
            Rule(
                source=f"{old}.attn.qkv_proj",
                targets=tuple(f"{new}.self_attn.{name}_proj" for name in "qkv"),
                rows=Rows(blocks, ((0, rows), (2, rows), (1, rows))),
            ),
            Rule(source=f"{old}.attn.out_proj", targets=(f"{new}.self_attn.o_proj",)),
            Rule(source=f"{old}.mlp.fc_in", targets=(f"{new}.mlp.up_proj",)),
            Rule(source=f"{old}.mlp.fc_out", targets=(f"{new}.mlp.down_proj",)),
            Rule(source="transformer.ln_f", targets=("model.norm",)),
            Rule(source="lm_head", targets=("lm_head",)),
        ],
        prefix="transformer.",
        ignored=(r"\.attn\.(causal_mask|bias|masked_bias)$",),
    )


FAMILY = Family(
    name="codegen",
    architectures=("CodeGenForCausalLM",),
    model_types=("codegen",),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    weight_map=_weight_map,
)
