"""Phi-3: Llama with q, k, v in one linear and gate and up in another, and LongRoPE. arXiv:2404.14219."""

from __future__ import annotations

from typing import Any

from burnish.models.config import ModelConfig
from burnish.models.families.family import Family, HFConfig, get, llama_rules, rotary_from_hf, token_ids
from burnish.models.families.llama import IGNORED, gated_rmsnorm_fields, gated_rmsnorm_to_hf
from burnish.models.weight_map import Rows, Rule, WeightMap


def _config_from_hf(hf: HFConfig) -> ModelConfig:
    hf = {**hf, "original_max_position_embeddings": get(hf, "original_max_position_embeddings", 4096)}
    for key in ("rope_scaling", "rope_parameters"):
        record = hf.get(key)
        # Early files call LongRoPE "su" or "yarn"; the class has no other scaling.
        if record and (record.get("rope_type") or record.get("type")) in ("su", "yarn"):
            hf[key] = {**record, "rope_type": "longrope"}
    fields = gated_rmsnorm_fields(hf)
    return ModelConfig(
        family=FAMILY.name,
        **fields,
        **rotary_from_hf(hf, head_dim=fields["head_dim"]),
        sliding_window=hf.get("sliding_window"),
        tie_word_embeddings=bool(get(hf, "tie_word_embeddings", False)),
        **token_ids(hf, bos=1, eos=32000),
    )


def _config_to_hf(config: ModelConfig) -> dict[str, Any]:
    scaling = dict(config.rope_scaling or {})
    record = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **gated_rmsnorm_to_hf(config),
        "partial_rotary_factor": config.rotary_dim / config.head_dim,
        "original_max_position_embeddings": scaling.pop(
            "original_max_position_embeddings", config.max_position_embeddings
        ),
        "sliding_window": config.sliding_window,
        "pad_token_id": None,
    }
    if scaling:
        # The key is "type" here: transformers 4 accepts nothing else for this class.
        record["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    return record


def _weight_map(config: ModelConfig) -> WeightMap:
    layer = "model.layers.{i}"
    fused = {f"{layer}.self_attn.{name}_proj" for name in "qkv"} | {
        f"{layer}.mlp.{name}_proj" for name in ("gate", "up")
    }
    rules = [rule for rule in llama_rules(config) if rule.source not in fused]
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rules.append(
        Rule(
            source=f"{layer}.self_attn.qkv_proj",
            targets=tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv"),
            rows=Rows(1, ((0, query), (1, key), (2, key))),
        )
    )
    rules.append(
        Rule(
            source=f"{layer}.mlp.gate_up_proj",
            targets=(f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
            rows=Rows(1, ((0, config.intermediate_size), (1, config.intermediate_size))),
        )
    )
    return WeightMap(rules, ignored=IGNORED)


FAMILY = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    weight_map=_weight_map,
)
