"""Tiny decoders and rows to train on, and transformers models to compare with."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

VOCAB = 97


@dataclass(frozen=True)
class Row:
    tokens: list[int]
    labels: list[int]


def _make_rows(count: int, *, seed: int = 0, shortest: int = 6, longest: int = 19) -> list[Row]:
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        length = source.randint(shortest, longest)
        tokens = [source.randrange(VOCAB) for _ in range(length)]
        masked = source.randint(1, length - 2)
        rows.append(Row(tokens, [-100] * masked + tokens[masked:]))
    return rows


@pytest.fixture
def make_rows() -> Callable[..., list[Row]]:
    """Random rows with a masked beginning."""
    return _make_rows


@pytest.fixture
def make_decoder() -> Callable[..., Decoder]:
    """A random Llama decoder; the same seed gives the same weights."""

    def make(*, seed: int = 0, **settings: Any) -> Decoder:
        shape: dict[str, Any] = {
            "family": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_layers": 2,
            "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 8, "max_position_embeddings": 64,
        }  # fmt: skip
        return Decoder(ModelConfig(**{**shape, **settings})).initialize(std=0.2, seed=seed).eval()

    return make


_LLAMA: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_GPT: dict[str, Any] = {"n_embd": 40, "n_layer": 2, "n_head": 5, "n_positions": 64}
HF_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "llama-tied": ("Llama", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 7}),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 8}),
    "gpt2": ("GPT2", _GPT),
    "gpt-neox": ("GPTNeoX", {key: _LLAMA[key] for key in _LLAMA if key != "num_key_value_heads"}),
    "bloom": ("Bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "falcon-7b": ("Falcon", {"hidden_size": 56, "num_hidden_layers": 2, "num_attention_heads": 7}),
    "falcon-40b": (
        "Falcon",
        {
            "hidden_size": 56, "num_hidden_layers": 2, "num_attention_heads": 14, "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
    ),
    "codegen": ("CodeGen", {"n_embd": 96, "n_layer": 2, "n_head": 8, "n_positions": 64, "n_ctx": 64, "rotary_dim": 6}),
    "phi3": ("Phi3", _LLAMA),
}  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """A transformers model (float32, random) and the folder that holds it."""

    folder: Path
    load: Callable[[], Any]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """A transformers model by name, saved once; `load` gives a fresh copy."""
    import transformers

    made: dict[str, Reference] = {}

    def make(name: str) -> Reference:
        if name not in made:
            stem, settings = HF_MODELS[name]
            config = getattr(transformers, f"{stem}Config")(
                vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings
            )
            head = "GPT2LMHeadModel" if stem == "GPT2" else f"{stem}ForCausalLM"
            kind = getattr(transformers, head)
            torch.manual_seed(sum(map(ord, name)))
            model = kind(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape)
                    parameter.copy_(0.15 * noise) if parameter.dim() > 1 else parameter.add_(0.2 * noise)
            folder = tmp_path_factory.mktemp(name)
            with contextlib.redirect_stderr(io.StringIO()):
                model.save_pretrained(folder)

            def load() -> Any:
                with contextlib.redirect_stderr(io.StringIO()):
                    return kind.from_pretrained(folder, dtype=torch.float32).eval()

            made[name] = Reference(folder, load)
        return made[name]

    return make
