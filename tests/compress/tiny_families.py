"""Tiny random transformers models of several families, saved: grouped heads, parallel residuals, biases, tied heads."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 101
_LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
_NEOX: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 81,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
_FALCON: dict[str, Any] = {"hidden_size": 56, "num_hidden_layers": 3, "max_position_embeddings": 64}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama-grouped": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama-biases": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "qwen2-tied": ("Qwen2ForCausalLM", "Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 10}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA, "sliding_window": 5}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**_LLAMA, "num_key_value_heads": 4}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_LLAMA, "sliding_window": 6, "query_pre_attn_scalar": 6}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 45, "n_layer": 3, "n_head": 5, "n_positions": 64}),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _NEOX),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 48, "n_layer": 3, "n_head": 6}),
    "falcon-7b": ("FalconForCausalLM", "FalconConfig", {**_FALCON, "num_attention_heads": 7}),
    "codegen": (
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4},
    ),
}


def write_family(name: str, folder: Path) -> Path:
    """Build, randomize and save one of `FAMILIES`; the same name gives the same weights."""
    model_class, config_class, settings = FAMILIES[name]
    config = getattr(transformers, config_class)(
        vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings
    )
    model = getattr(transformers, model_class)(config).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    model.tie_weights()
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    return folder


def load_in_transformers(folder: Path) -> PreTrainedModel:
    """As users do, in float32; no key may be missing, unexpected or of another shape."""
    with contextlib.redirect_stderr(io.StringIO()):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    model, report = loaded
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def random_rows(count: int = 6, length: int = 32) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for _ in range(count)]
