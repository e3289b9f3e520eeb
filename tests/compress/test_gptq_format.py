from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gptq_reader import dense_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import odd_linears, quantized_linears, read_quantization_config, save_quantized
from burnish.compress.loading import load_model
from burnish.compress.quantize import quantize_model
from burnish.errors import CheckpointError, CompressionError
from burnish.models.decoder import Decoder

VOCAB = 101
_LLAMA: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_FALCON: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, "attention_bias": True}),
    "qwen2-tied": ("Qwen2ForCausalLM", "Qwen2Config", {**_LLAMA, "tie_word_embeddings": True}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64}),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "max_position_embeddings": 64,
        },
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 48, "n_layer": 2, "n_head": 6}),
    "falcon-7b": ("FalconForCausalLM", "FalconConfig", {**_FALCON, "num_attention_heads": 8}),
    "falcon-40b": (
        "FalconForCausalLM",
        "FalconConfig",
        {**_FALCON, "num_attention_heads": 8, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "codegen": (
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4},
    ),
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def parent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random transformers model of each family, saved."""
    model_class, config_class, settings = FAMILIES[request.param]
    config = getattr(transformers, config_class)(
        vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings
    )
    model = getattr(transformers, model_class)(config).eval()
    generator = torch.Generator().manual_seed(len(request.param))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    model.tie_weights()
    folder = tmp_path_factory.mktemp(request.param)
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
    return folder


def _examples() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, VOCAB, (32,), generator=generator).tolist() for _ in range(6)]


def _greedy(logits: Callable[[torch.Tensor], torch.Tensor], *, steps: int = 16) -> list[int]:
    tokens = torch.tensor([[5, 9, 17]])
    for _ in range(steps):
        tokens = torch.cat([tokens, logits(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[0].tolist()


def _in_transformers(child: Path, folder: Path) -> PreTrainedModel:
    """The child as the independent reader sees it, written to `folder` as dense weights, in transformers."""
    record = json.loads((child / "config.json").read_text())
    del record["quantization_config"]
    packed = {name.removesuffix(".qweight") for name in load_file(child / "model.safetensors") if "qweight" in name}
    dense = {name: torch.from_numpy(tensor) for name, tensor in dense_tensors(child).items()}
    if record["model_type"] == "gpt2":
        # Its dense weights are stored (in, out); packed ones are not.
        for name in packed:
            dense[f"{name}.weight"] = dense[f"{name}.weight"].t().contiguous()
    folder.mkdir()
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(record))
    with contextlib.redirect_stderr(io.StringIO()):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=_attention(record), output_loading_info=True
        )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def _attention(record: dict[str, Any]) -> str:
    # Plain matrix products where the family has them; Falcon's own choice where its plain form differs.
    return "sdpa" if record["model_type"] == "falcon" else "eager"


@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(bits=4, group_size=32),
        QuantizeConfig(bits=4, group_size=16, symmetric=False, activation_order=True),
        QuantizeConfig(bits=8, group_size=-1),
    ],
    ids=["4-bit", "4-bit-asymmetric-ordered", "8-bit-channel"],
)
@torch.no_grad()
def test_saved_folder_loads_back_exactly_and_answers_alike_elsewhere(
    parent: Path, tmp_path: Path, config: QuantizeConfig
) -> None:
    decoder = load_model(parent, dtype="float32")
    quantize_model(decoder, _examples(), config)
    child = tmp_path / "child"
    save_quantized(decoder, child, source=parent, config=config)
    loaded = load_model(child, dtype="float32")
    tokens = torch.tensor(_examples()[:2])
    assert torch.equal(loaded(tokens), decoder(tokens))
    other = _in_transformers(child, tmp_path / "dense")
    assert torch.allclose(other(tokens).logits, loaded(tokens), atol=1e-4)
    assert _greedy(loaded) == _greedy(lambda tokens: other(tokens).logits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@torch.no_grad()
def test_sizes_that_fill_no_words_load_back_exactly(
    make_decoder: Callable[..., Decoder], examples: list[list[int]], tmp_path: Path, bits: int
) -> None:
    # 36 input features take 4.5 words of 4 bits, and 43 take 5.375.
    decoder = make_decoder(hidden=36, inner=43, bias=True)
    config = QuantizeConfig(bits=bits, group_size=13, symmetric=False)
    quantize_model(decoder, examples, config)
    save_quantized(decoder, tmp_path, source=None, config=config)
    assert "model.layers.0.mlp.up_proj" in odd_linears(decoder)
    loaded = load_model(tmp_path, dtype="float32")
    tokens = torch.tensor([examples[0]])
    assert torch.equal(loaded(tokens), decoder(tokens))
    ours = {name: layer.dequantize() for name, layer in quantized_linears(loaded).items()}
    theirs = dense_tensors(tmp_path)
    for name, weight in ours.items():
        assert torch.equal(weight, torch.from_numpy(theirs[f"{name}.weight"]))


def test_file_holds_the_common_layout(
    make_decoder: Callable[..., Decoder], examples: list[list[int]], tmp_path: Path
) -> None:
    decoder = make_decoder(hidden=64, inner=96)
    config = QuantizeConfig(bits=4, group_size=32)
    quantize_model(decoder, examples, config)
    assert odd_linears(decoder) == []
    save_quantized(decoder, tmp_path, source=None, config=config)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    found = {key.rpartition(".")[2]: (t.dtype, tuple(t.shape)) for key, t in tensors.items() if key.startswith(name)}
    assert found == {
        "qweight": (torch.int32, (12, 64)),
        "qzeros": (torch.int32, (3, 8)),
        "scales": (torch.float16, (3, 64)),
        "g_idx": (torch.int32, (96,)),
    }
    assert set(tensors[f"{name}.qzeros"].flatten().tolist()) == {0x77777777}
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    assert expected.items() <= written.items()
    assert written["checkpoint_format"] == "gptq"


def test_saving_leaves_the_running_model_as_it_was(
    make_decoder: Callable[..., Decoder], examples: list[list[int]], tmp_path: Path
) -> None:
    decoder = make_decoder()
    config = QuantizeConfig(bits=4, group_size=16)
    quantize_model(decoder, examples, config)
    tokens = torch.tensor([examples[0]])
    before = decoder(tokens)
    save_quantized(decoder, tmp_path, source=None, config=config)
    assert all(layer.centred is not None for layer in quantized_linears(decoder).values())
    assert torch.equal(decoder(tokens), before)


def test_dense_model_is_refused(make_decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="no quantized linears"):
        save_quantized(make_decoder(), tmp_path, source=None, config=QuantizeConfig())


def test_config_that_was_not_used_is_refused(
    make_decoder: Callable[..., Decoder], examples: list[list[int]], tmp_path: Path
) -> None:
    decoder = make_decoder()
    quantize_model(decoder, examples, QuantizeConfig(bits=8, group_size=16))
    with pytest.raises(CompressionError, match=r"q_proj is not quantized as the config says; got bits 8"):
        save_quantized(decoder, tmp_path, source=None, config=QuantizeConfig(bits=4, group_size=16))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "a method that cannot be read; got 'awq'"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 128}, "out of range; got bits 5"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size 0"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format that cannot be read"),
        ({"quant_method": "gptq", "dynamic": {"+:model": {"bits": 7}}}, "got bits 7"),
        ({"quant_method": "gptq", "dynamic": {"+:model": None}}, "says nothing of"),
        ({"quant_method": "gptq", "dynamic": {"+:model[": {}}}, "pattern that cannot be read"),
        ({"quant_method": "gptq", "dynamic": ["model"]}, "dynamic that is no object"),
    ],
)
def test_quantization_config_that_cannot_be_read_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_quantization_config({"quantization_config": record})


def test_overrides_change_or_exclude_modules() -> None:
    config = read_quantization_config(
        {
            "quantization_config": {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": 128,
                "dynamic": {r"-:.*\.0\.mlp": {}, r"+:.*down_proj": {"bits": 8, "group_size": 32}},
            }
        }
    )
    assert config is not None
    assert config.format_of("model.layers.0.mlp.down_proj") is None
    changed, plain = config.format_of("model.layers.1.mlp.down_proj"), config.format_of("model.layers.1.mlp.up_proj")
    assert changed is not None
    assert plain is not None
    assert (changed.bits, changed.group_size, plain.bits, plain.group_size) == (8, 32, 4, 128)
