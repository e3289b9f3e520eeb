"""GGUF files, read back by the `gguf` package.

With llama.cpp itself: see docs/formats.md for what was run and when.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from burnish.compress.gguf_export import dense_values, export_gguf
from burnish.compress.gguf_layout import gguf_layout
from burnish.compress.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNUSED, gguf_vocabulary
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.data.bundled import bundled_path
from burnish.data.tokenizer import Tokenizer
from burnish.errors import CheckpointError, ConfigError, MissingExtraError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

VOCAB = 3080  # eight rows more than the tokenizer has tokens
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rotary_dim": 16,
}
_GPT: dict[str, Any] = {
    "norm": "layernorm",
    "mlp": "plain",
    "activation": "gelu_tanh",
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "num_kv_heads": 4,
}
_GEMMA: dict[str, Any] = {
    "activation": "gelu_tanh",
    "output_norms": True,
    "norm_weight_offset": 1.0,
    "embedding_scale": 8.0,
    "attention_scale": 0.25,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "tie_word_embeddings": True},
    "llama-biases": {"family": "llama", "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "llama-3": {
        "family": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"family": "mistral", "sliding_window": 48},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": True, "head_dim": 32, "rotary_dim": 32},
    "gpt2": {"family": "gpt2", **_GPT, "position": "learned", "rotary_dim": 0, "tie_word_embeddings": True},
    "gpt_neox": {"family": "gpt_neox", **_GPT, "rotary_dim": 4, "parallel_residual": True},
    "bloom": {
        "family": "bloom",
        **_GPT,
        "position": "alibi",
        "rotary_dim": 0,
        "embedding_norm": True,
        "tie_word_embeddings": True,
    },
    "falcon-7b": {
        "family": "falcon",
        "norm": "layernorm",
        "mlp": "plain",
        "activation": "gelu",
        "num_kv_heads": 1,
        "parallel_residual": True,
        "shared_norm": True,
        "tie_word_embeddings": True,
    },
    "falcon-40b": {
        "family": "falcon",
        "norm": "layernorm",
        "mlp": "plain",
        "activation": "gelu",
        "parallel_residual": True,
    },
    "phi3": {"family": "phi3", "rotary_dim": 8},
    "gemma2": {
        "family": "gemma2",
        **_GEMMA,
        "attention_softcap": 50.0,
        "logit_softcap": 30.0,
        "layer_windows": (16, None),
    },
    "gemma3": {
        "family": "gemma3",
        **_GEMMA,
        "qk_norm": True,
        "local_rope_theta": 100.0,
        "layer_windows": (16, None),
    },
}


def config_of(name: str) -> ModelConfig:
    """One of the tiny models, as the families' own records would describe it."""
    return ModelConfig(**{**_SIZES, **FAMILIES[name]})


def random_decoder(config: ModelConfig, *, seed: int = 1) -> Decoder:
    """No parameter is left at a value that a wrong order or a lost one would not show."""
    decoder = Decoder(config, dtype=torch.float32).initialize(std=0.15, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return decoder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(bundled_path("burnish-sql-base"))


@pytest.fixture
def read(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Any]:
    """Write a decoder and open the file with the package's reader."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

    def run(decoder: Decoder, **options: Any) -> Any:
        export_gguf(decoder, tmp_path / "model.gguf", tokenizer=tokenizer, **options)
        assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
        return gguf.GGUFReader(tmp_path / "model.gguf")

    return run


def dequantized(reader: Any) -> dict[str, np.ndarray]:
    from gguf.quants import dequantize

    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def field(reader: Any, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_one_that_the_architecture_has(name: str, read: Callable[..., Any]) -> None:
    import gguf

    config = config_of(name)
    decoder = random_decoder(config)
    reader = read(decoder, format="f16")
    architecture = field(reader, "general.architecture")
    known = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    patterns = {gguf.TENSOR_NAMES[key] for key in gguf.MODEL_TENSORS[known]}
    for tensor in reader.tensors:
        stem = tensor.name.rpartition(".")[0]
        parts = stem.split(".")
        assert (stem if parts[0] != "blk" else f"blk.{{bid}}.{'.'.join(parts[2:])}") in patterns, tensor.name
    numbers = sum(math.prod(tensor.shape) for tensor in reader.tensors)
    doubled = config.vocab_size * config.hidden_size if name == "gpt_neox" and config.tie_word_embeddings else 0
    assert numbers == config.num_parameters() + doubled + (8 if name == "llama-3" else 0)
    assert field(reader, f"{architecture}.block_count") == 2


def test_q_and_k_rotate_in_neighbouring_pairs_as_ours_rotate_in_halves(read: Callable[..., Any]) -> None:
    decoder = random_decoder(config_of("llama-biases"))
    stored = dequantized(read(decoder, format="f16"))
    x_TD = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).numpy()
    angles = np.arange(5)[:, None] * (10000.0 ** (-np.arange(0, 16, 2) / 16))
    rotation = np.exp(1j * angles)[:, None, :]

    def by_halves(values: np.ndarray) -> np.ndarray:
        heads = values.reshape(5, -1, 16)
        turned = (heads[..., :8] + 1j * heads[..., 8:]) * rotation
        return np.concatenate((turned.real, turned.imag), -1)

    def by_pairs(values: np.ndarray) -> np.ndarray:
        heads = values.reshape(5, -1, 16)
        turned = (heads[..., ::2] + 1j * heads[..., 1::2]) * rotation
        return np.stack((turned.real, turned.imag), -1).reshape(heads.shape)

    ours, theirs = [], []
    for short, long in (("q", "q_proj"), ("k", "k_proj")):
        weight, bias = (dense_values(decoder, f"model.layers.1.self_attn.{long}.{leaf}").numpy() for leaf in WB)
        ours.append(by_halves(x_TD @ weight.T + bias))
        theirs.append(by_pairs(x_TD @ stored[f"blk.1.attn_{short}.weight"].T + stored[f"blk.1.attn_{short}.bias"]))
    scores = [np.einsum("thd,shd->hts", q, np.repeat(k, 2, axis=1)) for q, k in (ours, theirs)]
    assert np.abs(scores[0]).max() > 1
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-2)


WB = ("weight", "bias")


@pytest.mark.parametrize(("format", "levels"), [("q8_0", 127), ("q4_0", 8)])
def test_dequantized_weights_are_within_the_formats_rounding(
    format: str, levels: int, read: Callable[..., Any]
) -> None:
    decoder = random_decoder(config_of("qwen2"))
    reader = read(decoder, format=format)
    stored = dequantized(reader)
    for short, name in (("attn_q", "self_attn.q_proj"), ("ffn_down", "mlp.down_proj"), ("ffn_up", "mlp.up_proj")):
        ours = dense_values(decoder, f"model.layers.1.{name}.weight").numpy()
        theirs = stored[f"blk.1.{short}.weight"]
        peak = np.abs(ours.reshape(-1, 32)).max(1, keepdims=True)
        # Half a step, and a whole one at the end that 4 bits lack; the scale itself is rounded to float16.
        allowed = peak / levels * (0.5 if levels == 127 else 1.0) + peak * 2e-3
        assert (np.abs(ours - theirs).reshape(-1, 32) <= allowed).all()
        assert np.abs(ours - theirs).max() > 0
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == format.upper()
    assert kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.attn_q.bias"] == "F32"


@pytest.mark.parametrize("format", ["f16", "bf16"])
def test_fused_rows_and_shifted_norms_are_in_llama_cpps_order(format: str, read: Callable[..., Any]) -> None:
    tolerance: dict[str, float] = {"rtol": 2e-3 if format == "f16" else 1e-2, "atol": 1e-6}
    for name in ("phi3", "bloom", "falcon-40b", "gemma3"):
        decoder = random_decoder(config_of(name))
        stored = dequantized(read(decoder, format=format))
        state = {key: value.detach().numpy() for key, value in decoder.state_dict().items()}
        block = "model.layers.0"
        if name == "gemma3":
            np.testing.assert_allclose(
                stored["blk.0.attn_q_norm.weight"], state[f"{block}.self_attn.q_norm.weight"] + 1, rtol=1e-6
            )
            continue
        joined = np.concatenate([state[f"{block}.self_attn.{part}_proj.weight"] for part in "qkv"])
        np.testing.assert_allclose(stored["blk.0.attn_qkv.weight"], joined, **tolerance)
        if name == "phi3":
            both = np.concatenate([state[f"{block}.mlp.{part}_proj.weight"] for part in ("gate", "up")])
            np.testing.assert_allclose(stored["blk.0.ffn_up.weight"], both, **tolerance)
        if name == "falcon-40b":
            np.testing.assert_allclose(
                stored["blk.0.attn_norm_2.weight"], state[f"{block}.input_layernorm.weight"], rtol=1e-6
            )


def test_rows_that_blocks_do_not_divide_stay_float16_and_are_named(
    make_decoder: Callable[..., Decoder], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    decoder = random_decoder(ModelConfig(**{**_SIZES, "family": "qwen2", "intermediate_size": 52}))
    report = export_gguf(decoder, tmp_path / "odd.gguf", tokenizer=tokenizer, format="q4_0")
    assert report.kept_f16 == ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight")


def test_quantized_linears_are_rebuilt(read: Callable[..., Any]) -> None:
    decoder = random_decoder(config_of("qwen2"))
    name = "model.layers.0.mlp.up_proj"
    generator = torch.Generator().manual_seed(5)
    layer = GroupQuantizedLinear(64, 96, bits=4, group_size=32)
    layer.qweight.copy_(torch.randint(-(2**31), 2**31 - 1, layer.qweight.shape, generator=generator))  # type: ignore[union-attr]
    layer.scales.copy_(torch.rand(layer.scales.shape, generator=generator) + 0.5)  # type: ignore[union-attr]
    decoder.set_submodule(name, layer)
    stored = dequantized(read(decoder, format="f16"))
    expected = layer.dequantize().numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(stored["blk.0.ffn_up.weight"], expected, rtol=1e-3)


def test_the_vocabulary_holds_pieces_kinds_merges_and_ends(read: Callable[..., Any], tokenizer: Tokenizer) -> None:
    reader = read(random_decoder(config_of("qwen2")), format="f16")
    pieces, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert len(pieces) == len(kinds) == VOCAB
    assert pieces[5] == "<|end|>"
    assert (kinds[5], kinds[6], kinds[VOCAB - 1]) == (CONTROL, NORMAL, UNUSED)
    assert field(reader, "tokenizer.ggml.model") == "gpt2"
    assert field(reader, "tokenizer.ggml.eos_token_id") == tokenizer.eos_id
    assert not field(reader, "tokenizer.ggml.add_bos_token")
    assert field(reader, "tokenizer.chat_template") == tokenizer.chat_template
    assert len(field(reader, "tokenizer.ggml.merges")) == 2810


def test_scores_merge_as_the_tokenizer_does(shared_data: Path) -> None:
    tokenizer = Tokenizer.load(shared_data / "models" / "stories260k")
    vocabulary = gguf_vocabulary(tokenizer, vocab_size=512).settings
    ids = {piece: number for number, piece in enumerate(vocabulary["tokens"])}
    assert vocabulary["model"] == "llama"
    assert vocabulary["add_bos_token"]
    assert vocabulary["add_space_prefix"]
    assert vocabulary["token_type"][3:259] == [BYTE] * 256
    for text in ("Once upon a time, there was a little girl named Lily.", "She didn't see it!\nZebra 42", "naïve"):
        pieces = list("▁" + text.replace(" ", "▁"))
        while True:  # SentencePiece: of all neighbours that make a piece, those of the best score first
            pairs = [(n, left + right) for n, (left, right) in enumerate(pairwise(pieces))]
            known = [(vocabulary["scores"][ids[both]], -n) for n, both in pairs if both in ids]
            if not known:
                break
            place = -max(known)[1]
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        found = []
        for piece in pieces:
            found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
        assert found == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("llama", {"activation": "gelu"}, "the activation gelu"),
        ("llama", {"rotary_dim": 8}, "rotate in part"),
        ("qwen3", {"o_bias": True}, "biases on o"),
        ("gpt2", {"scale_by_layer": True}, "scaling of attention"),
        ("bloom", {"residual_from_norm": True}, "after the norm"),
        ("falcon-40b", {"parallel_residual": False}, "sequential"),
        ("gemma2", {"attention_scale": 0.5}, "scaling of attention"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ("llama", {"family": "codegen"}, "codegen"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(name: str, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        gguf_layout(replace(config_of(name), **change))


def test_a_window_that_llama_cpp_lacks_shortens_the_context() -> None:
    layout = gguf_layout(config_of("mistral"))
    assert layout.settings["context_length"] == 48
    assert "no attention windows" in layout.notes[0]


def test_failures_leave_nothing_behind(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    decoder = random_decoder(config_of("qwen2"))
    decoder.model.layers[1].mlp.down_proj.weight.data[0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down\.weight does not fit into F16"):
        export_gguf(decoder, tmp_path / "model.gguf", tokenizer=tokenizer, format="f16")
    with pytest.raises(CheckpointError, match="ids beyond"):
        gguf_vocabulary(tokenizer, vocab_size=100)
    decoder.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="NaN"):
        export_gguf(decoder, tmp_path / "model.gguf", tokenizer=tokenizer, format="bf16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"burnish\[gguf\]"):
        export_gguf(decoder, tmp_path / "model.gguf", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())
