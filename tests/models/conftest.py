"""Tiny random transformers models, one or more per family, with no weight left at its neutral value."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 101
NUM_TOKENS = 23


@dataclass(frozen=True)
class TinyModel:
    """A transformers model, the folder that holds it, tokens to try, and its logits on them."""

    name: str
    model: PreTrainedModel
    folder: Path
    tokens_BT: torch.Tensor
    logits_BTV: torch.Tensor


def _attention(model_type: str) -> str:
    """The reference: plain matrix products, but for Falcon its default, as its plain form adds ALiBi twice."""
    return "sdpa" if model_type == "falcon" else "eager"


def _model(name: str, **settings: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        config_class = getattr(transformers, name.replace("ForCausalLM", "Config").replace("LMHeadModel", "Config"))
        if name == "Gemma3ForCausalLM":
            config_class = transformers.Gemma3TextConfig
        config = config_class(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings)
        return getattr(transformers, name)._from_config(config, attn_implementation=_attention(config.model_type))

    return build


_LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GPT: dict[str, Any] = {"n_embd": 40, "n_layer": 3, "n_head": 5, "n_positions": 64}
_NEOX: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
_FALCON: dict[str, Any] = {"hidden_size": 56, "num_hidden_layers": 3, "max_position_embeddings": 64}

CASES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _model("LlamaForCausalLM", **_LLAMA),
    "llama-biases": _model("LlamaForCausalLM", **_LLAMA, attention_bias=True, mlp_bias=True, head_dim=10),
    "llama-3-tied": _model(
        "LlamaForCausalLM", **_LLAMA, tie_word_embeddings=True, rope_parameters=_LLAMA3_ROPE, hidden_act="gelu"
    ),
    "llama-linear": _model(
        "LlamaForCausalLM", **_LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
    ),
    "llama-dynamic": _model(
        "LlamaForCausalLM",
        **{**_LLAMA, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    ),
    "llama-yarn": _model(
        "LlamaForCausalLM",
        **_LLAMA,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": _model("MistralForCausalLM", **_LLAMA, sliding_window=5),
    "mistral-no-window": _model("MistralForCausalLM", **_LLAMA, sliding_window=None),
    "qwen2": _model("Qwen2ForCausalLM", **_LLAMA),
    "qwen2-windows-tied": _model(
        "Qwen2ForCausalLM",
        **_LLAMA,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": _model("Qwen3ForCausalLM", **_LLAMA, head_dim=20),
    "qwen3-windows": _model(
        "Qwen3ForCausalLM",
        **_LLAMA,
        head_dim=12,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt2": _model("GPT2LMHeadModel", **_GPT),
    "gpt2-variant": _model(
        "GPT2LMHeadModel",
        **_GPT,
        n_inner=72,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        activation_function="relu",
        tie_word_embeddings=False,
    ),
    "gpt-neox": _model("GPTNeoXForCausalLM", **_NEOX, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "gpt-neox-sequential": _model(
        "GPTNeoXForCausalLM",
        **_NEOX,
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    ),
    "bloom": _model("BloomForCausalLM", hidden_size=48, n_layer=3, n_head=6),
    "bloom-residual-from-norm": _model(
        "BloomForCausalLM", hidden_size=48, n_layer=3, n_head=4, apply_residual_connection_post_layernorm=True
    ),
    "falcon-7b": _model("FalconForCausalLM", **_FALCON, num_attention_heads=7),
    "falcon-40b": _model(
        "FalconForCausalLM",
        **_FALCON,
        num_attention_heads=14,
        num_kv_heads=2,
        new_decoder_architecture=True,
        tie_word_embeddings=False,
    ),
    "falcon-11b": _model(
        "FalconForCausalLM",
        **_FALCON,
        num_attention_heads=14,
        num_kv_heads=2,
        new_decoder_architecture=True,
        num_ln_in_parallel_attn=1,
    ),
    "falcon-rw": _model(
        "FalconForCausalLM",
        **_FALCON,
        num_attention_heads=7,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        ffn_hidden_size=72,
    ),
    "codegen": _model("CodeGenForCausalLM", n_embd=96, n_layer=3, n_head=8, n_positions=64, n_ctx=64, rotary_dim=6),
    "phi3": _model(
        "Phi3ForCausalLM",
        **_LLAMA,
        sliding_window=7,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "phi3-longrope": _model(
        "Phi3ForCausalLM",
        **_LLAMA,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.3, 1.5],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
        },
    ),
    "gemma2": _model(
        "Gemma2ForCausalLM",
        **_LLAMA,
        head_dim=12,
        query_pre_attn_scalar=20,
        sliding_window=6,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3": _model(
        "Gemma3ForCausalLM",
        **_LLAMA,
        head_dim=12,
        query_pre_attn_scalar=20,
        sliding_window=5,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
}


def randomize(model: torch.nn.Module, *, seed: int) -> None:
    """Give every parameter a value that a wrong order, a lost bias or a skipped norm would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.15 * noise)
            else:
                parameter.add_(0.3 * noise)


def quiet_save(model: PreTrainedModel, folder: Path) -> None:
    """Save without the progress bars that transformers writes to stderr."""
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)


def quiet_load(folder: Path) -> PreTrainedModel:
    """Load through transformers as users do, in float32, refusing missing or unexpected keys."""
    attention = _attention(json.loads((folder / "config.json").read_text())["model_type"])
    with contextlib.redirect_stderr(io.StringIO()):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
        )
    model, report = loaded
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    return model.eval()


def make_tiny(name: str, folder: Path) -> TinyModel:
    """Build, randomize and save one case; the same name gives the same weights."""
    seed = sum(map(ord, name))
    model = CASES[name]().eval()
    randomize(model, seed=seed)
    model.tie_weights()
    quiet_save(model, folder)
    tokens_BT = torch.randint(1, VOCAB, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits_BTV = model(tokens_BT, use_cache=False).logits
    return TinyModel(name, model, folder, tokens_BT, logits_BTV)


@pytest.fixture(scope="session", params=sorted(CASES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Each case in turn."""
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """A case by name, built once."""
    made: dict[str, TinyModel] = {}

    def make(name: str) -> TinyModel:
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture
def load_in_transformers() -> Callable[[Path], PreTrainedModel]:
    """Loads a folder through transformers, refusing missing or unexpected keys."""
    return quiet_load
