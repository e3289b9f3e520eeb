"""A random decoder for every way in which families differ, made without files; no weight is at its neutral value."""

from __future__ import annotations

from typing import Any

import torch

from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

VOCAB = 96
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rotary_dim": 8,
}
_LAYERNORM: dict[str, Any] = {
    "norm": "layernorm",
    "mlp": "plain",
    "activation": "gelu",
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
}
_FALCON: dict[str, Any] = {"norm": "layernorm", "mlp": "plain", "activation": "gelu", "parallel_residual": True}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "head_dim": 10, "rotary_dim": 10},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True},
    "phi3": {"num_kv_heads": 6},
    "gemma2": {
        "norm_weight_offset": 1.0,
        "output_norms": True,
        "embedding_scale": 48**0.5,
        "attention_scale": 0.25,
        "attention_softcap": 20.0,
        "logit_softcap": 10.0,
        "activation": "gelu_tanh",
        "tie_word_embeddings": True,
    },
    "gemma3": {"norm_weight_offset": 1.0, "output_norms": True, "qk_norm": True, "attention_scale": 0.25},
    "gpt2": {**_LAYERNORM, "position": "learned", "rotary_dim": 0, "num_kv_heads": 6, "tie_word_embeddings": True},
    "gpt_neox": {**_LAYERNORM, "parallel_residual": True, "num_kv_heads": 6},
    "gpt_neox-relu": {**_LAYERNORM, "activation": "relu", "num_kv_heads": 6},
    "bloom": {**_LAYERNORM, "position": "alibi", "rotary_dim": 0, "embedding_norm": True, "num_kv_heads": 6},
    "bloom-norm-residual": {
        **_LAYERNORM,
        "position": "alibi",
        "rotary_dim": 0,
        "residual_from_norm": True,
        "num_kv_heads": 6,
    },
    "falcon": {**_FALCON, "shared_norm": True, "num_kv_heads": 1},
    "falcon-grouped": _FALCON,
    "codegen": {**_FALCON, "shared_norm": True, "mlp_bias": True, "lm_head_bias": True, "num_kv_heads": 6},
}


def make_family(name: str) -> Decoder:
    """The same weights for the same name, float32, in eval mode."""
    config = ModelConfig(family=name.partition("-")[0], **{**_SIZES, **DECODERS[name]})
    decoder = Decoder(config, dtype=torch.float32).initialize(std=0.15, seed=len(name))
    generator = torch.Generator().manual_seed(7)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return decoder.eval()


def family_examples(*, count: int = 6, length: int = 40) -> list[list[int]]:
    """Calibration tokens for these decoders."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCAB, (count, length), generator=generator).tolist()
