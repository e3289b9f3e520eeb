"""Tiny random models of several families, what transformers generates from them, and a tokenizer without files."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from eager_drafter import EagerDrafter
from transformers import PreTrainedModel

from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams
from burnish.engine.sequence import Sequence
from burnish.engine.text_stream import TextStream
from burnish.errors import ConfigError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

BACKENDS = ("torch", "cpu")
VOCAB = 97
END = 2

_LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 6}),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 20}),
    "gpt2": ("GPT2", {"n_embd": 40, "n_layer": 3, "n_head": 5, "n_positions": 96}),
    "gpt-neox": (
        "GPTNeoX",
        {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "max_position_embeddings": 96,
        },
    ),
    "qwen2": ("Qwen2", _LLAMA),
    "codegen": (
        "CodeGen",
        {"n_embd": 96, "n_layer": 3, "n_head": 8, "n_positions": 96, "n_ctx": 96, "rotary_dim": 6},
    ),
    "phi3": ("Phi3", {**_LLAMA, "sliding_window": 7}),
    "phi3-longrope": (
        "Phi3",
        {
            **_LLAMA,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.5],
                "long_factor": [1.0, 2.0, 4.0, 8.0],
            },
        },
    ),
    "llama-dynamic": (
        "Llama",
        {
            **_LLAMA,
            "max_position_embeddings": 24,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
        },
    ),
    "falcon-rw": (
        "Falcon",
        {
            "hidden_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 7,
            "max_position_embeddings": 96,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            **_LLAMA,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "bloom": ("Bloom", {"hidden_size": 48, "n_layer": 3, "n_head": 6}),
    "falcon": (
        "Falcon",
        {"hidden_size": 56, "num_hidden_layers": 3, "num_attention_heads": 7, "max_position_embeddings": 96},
    ),
    "gemma2": (
        "Gemma2",
        {
            **_LLAMA,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
}


@dataclass(frozen=True)
class TinyModel:
    """A saved random model and its transformers twin."""

    name: str
    folder: Path
    model: PreTrainedModel
    known: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)

    def greedy(self, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
        """What transformers' generate appends to one prompt, end tokens ignored."""
        key = tuple(prompt)
        if len(self.known.get(key, ())) < num_tokens:
            self.known[key] = self._generate(prompt, num_tokens)
        return self.known[key][:num_tokens]

    def _generate(self, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
        settings = transformers.GenerationConfig(max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
        tokens_BT = torch.tensor([prompt])
        with torch.no_grad():
            # Rules that stretch with the longest sequence seen forget it when they see a short one.
            self.model(torch.tensor([[3]]))
            out_BT = self.model.generate(
                tokens_BT, attention_mask=torch.ones_like(tokens_BT), generation_config=settings
            )
        return tuple(out_BT[0, len(prompt) :].tolist())


def make_tiny(name: str, folder: Path) -> TinyModel:
    """Build and save one of `MODELS`; the same name gives the same weights."""
    prefix, settings = MODELS[name]
    config = getattr(transformers, "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config")(
        vocab_size=VOCAB, bos_token_id=1, eos_token_id=END, pad_token_id=0, **settings
    )
    class_name = f"{prefix}LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    attention = "sdpa" if prefix == "Falcon" else "eager"
    model = getattr(transformers, class_name)._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise) if parameter.dim() > 1 else parameter.add_(0.3 * noise)
    model.tie_weights()
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    # The tests ask for a fixed number of tokens from both sides.
    model.generation_config = transformers.GenerationConfig()
    return TinyModel(name, folder, model)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """A tiny model by name, built once."""
    made: dict[str, TinyModel] = {}

    def make(name: str) -> TinyModel:
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(scope="session", params=sorted(MODELS))
def tiny(request: pytest.FixtureRequest, tiny_model: Callable[[str], TinyModel]) -> TinyModel:
    """Each tiny model in turn."""
    return tiny_model(request.param)


@pytest.fixture(params=BACKENDS)
def native(request: pytest.FixtureRequest) -> Callable[..., NativeEngine]:
    """Makes a float32 engine over each backend in turn; skips where that one cannot run the model.

    With `eager` it guesses whenever there is something to copy, otherwise never.
    """

    def make(model: Path | Decoder, *, eager: bool = False, **options: Any) -> NativeEngine:
        try:
            engine = NativeEngine(model, dtype="float32", backend=request.param, speculation="off", **options)
            engine.drafter = EagerDrafter() if eager else None
            return engine
        except ConfigError as error:
            if "cannot run this" not in error.message:
                raise
            pytest.skip(error.message)

    return make


@pytest.fixture
def decoder() -> Decoder:
    """A random Llama-like decoder whose greedy answers vary from token to token."""
    config = ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rotary_dim=8,
        max_position_embeddings=256,
        eos_ids=(END,),
    )
    return Decoder(config).initialize(std=0.4, seed=3).eval()


class LetterTokenizer:
    """Ids 3.. are letters, and id 3 + 90 on are the bytes of a two-byte character; 0 pads, 1 begins, 2 ends."""

    eos_ids = frozenset({END})
    letters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?:;()0123456789+-*/=<>[]{}@#$%&_|~^"
    first_half, second_half = VOCAB - 2, VOCAB - 1

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) + 3 for letter in text]

    def encode_prompt(self, text: str) -> list[int]:
        return [1, *self.encode(text)]

    def render_chat(self, messages: Any, /) -> str:
        return "".join(f"[{message['role']}]{message['content']}" for message in messages) + "[assistant]"

    def decode(self, ids: Iterable[int]) -> str:
        decoder = self.stream_decoder()
        return "".join([decoder.push(token) for token in ids]) + decoder.flush()

    def stream_decoder(self) -> LetterDecoder:
        return LetterDecoder()


class LetterDecoder:
    """Holds the first half of a two-byte character back until the second arrives."""

    def __init__(self) -> None:
        self.held = False

    def push(self, token_id: int, /) -> str:
        text = self.flush() if self.held and token_id != LetterTokenizer.second_half else ""
        if token_id == LetterTokenizer.first_half:
            self.held = True
            return text
        if token_id == LetterTokenizer.second_half:
            held, self.held = self.held, False
            return text + ("é" if held else "\ufffd")
        place = token_id - 3
        return text + (LetterTokenizer.letters[place] if 0 <= place < len(LetterTokenizer.letters) else "")

    def flush(self) -> str:
        held, self.held = self.held, False
        return "\ufffd" if held else ""


@pytest.fixture
def tokenizer() -> LetterTokenizer:
    return LetterTokenizer()


def random_prompts(count: int, *, seed: int, shortest: int = 1, longest: int = 30) -> list[list[int]]:
    """Prompts of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., list[list[int]]]:
    return random_prompts


class Silent:
    """A piece decoder for sequences whose text does not matter."""

    def push(self, token_id: int, /) -> str:
        return ""

    def flush(self) -> str:
        return ""


def sequence_of(
    prompt: Iterable[int] = (0,),
    *,
    answer: Iterable[int] = (),
    ends: Iterable[int] = (),
    choice: int = 0,
    **settings: Any,
) -> Sequence:
    """A sequence without a model: its settings are those of `SamplingParams`."""
    params = SamplingParams(**settings)
    return Sequence(
        request_id=0,
        index=0,
        prompt=None,
        prompt_ids=list(prompt),
        params=params,
        end_ids=frozenset(ends),
        max_tokens=params.max_tokens,
        text=TextStream(Silent()),
        token_ids=list(answer),
        choice=choice,
    )


@pytest.fixture(scope="session")
def make_sequence() -> Callable[..., Sequence]:
    return sequence_of
