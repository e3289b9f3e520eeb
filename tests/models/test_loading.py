"""Loading checks names and shapes first, takes the wanted dtype, and needs little more memory than the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from burnish.errors import CheckpointError, ConfigError
from burnish.models.decoder import Decoder
from burnish.models.families.registry import FAMILIES
from burnish.models.linears import replace_linears
from burnish.models.loading import load_config, load_decoder, resolve_model, save_decoder

Edit = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def edited(tiny_model: Callable[[str], Any], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny model's folder with its tensors or config changed."""

    def edit(name: str, change: Edit = lambda state: None, **config: Any) -> Path:
        source = tiny_model(name).folder
        state = load_file(source / "model.safetensors")
        change(state)
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        record = json.loads((source / "config.json").read_text()) | config
        (tmp_path / "config.json").write_text(json.dumps(record))
        return tmp_path

    return edit


def test_missing_key_raises_naming_it(tiny: Any, tmp_path: Path) -> None:
    state = load_file(tiny.folder / "model.safetensors")
    name = next(name for name in state if ".1." in name and name.endswith("weight"))
    del state[name]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny.folder / "config.json").read_text())
    with pytest.raises(CheckpointError) as error:
        load_decoder(tmp_path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_left_over_key_raises_naming_it(tiny: Any, tmp_path: Path) -> None:
    state = load_file(tiny.folder / "model.safetensors")
    name = next(name for name in state if ".2." in name and name.endswith("weight"))
    state[name.replace(".2.", ".3.")] = state[name].clone()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny.folder / "config.json").read_text())
    with pytest.raises(CheckpointError) as error:
        load_decoder(tmp_path)
    assert name.replace(".2.", ".3.") in str(error.value)
    assert "no place" in str(error.value)


def test_bias_that_config_does_not_announce_raises(edited: Callable[..., Path]) -> None:
    folder = edited("llama", lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}))
    with pytest.raises(CheckpointError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_decoder(folder)


def test_wrong_shape_raises_before_anything_is_read(edited: Callable[..., Path]) -> None:
    def shrink(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.1.mlp.up_proj.weight"] = torch.ones(55, 48)

    with pytest.raises(CheckpointError) as error:
        load_decoder(edited("llama", shrink))
    message = str(error.value)
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "[55, 48]" in message
    assert "[56, 48]" in message
    assert "model.safetensors" in message


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "bloom", "falcon-40b", "codegen", "phi3"])
def test_wrong_shape_of_a_fused_tensor_raises(name: str, edited: Callable[..., Path]) -> None:
    def shrink(state: dict[str, torch.Tensor]) -> None:
        fused = next(
            key for key in state if ("qkv" in key or "c_attn" in key or "query_key" in key) and "weight" in key
        )
        state[fused] = state[fused][:-1].clone()

    with pytest.raises(CheckpointError, match="wrong shape"):
        load_decoder(edited(name, shrink))


def test_same_weight_under_two_names_raises(edited: Callable[..., Path]) -> None:
    folder = edited("gpt2", lambda state: state.update({"ln_f.weight": torch.ones(40)}))
    with pytest.raises(CheckpointError, match="are the same weight"):
        load_decoder(folder)


def test_files_of_the_bare_trunk_load(edited: Callable[..., Path], tiny_model: Callable[[str], Any]) -> None:
    def strip(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[name.removeprefix("transformer.")] = state.pop(name)

    decoder = load_decoder(edited("gpt2", strip))
    expected = tiny_model("gpt2")
    with torch.no_grad():
        assert torch.allclose(decoder(expected.tokens_BT), expected.logits_BTV, atol=1e-4)


def test_old_buffers_are_ignored(edited: Callable[..., Path]) -> None:
    buffers = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    load_decoder(edited("gpt2", lambda state: state.update(buffers)))


def test_tied_model_ignores_an_equal_output_layer_and_takes_a_different_one(
    edited: Callable[..., Path], tiny_model: Callable[[str], Any]
) -> None:
    def copy(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    assert load_decoder(edited("llama-3-tied", copy)).lm_head is None

    def differ(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"] = 2 * state["model.embed_tokens.weight"]

    decoder = load_decoder(edited("llama-3-tied", differ))
    expected = tiny_model("llama-3-tied")
    with torch.no_grad():
        assert torch.allclose(decoder(expected.tokens_BT), 2 * expected.logits_BTV, atol=2e-4)


def test_unknown_architecture_lists_the_known_ones_and_offers_transformers(edited: Callable[..., Path]) -> None:
    folder = edited("llama", architectures=["MambaForCausalLM"], model_type="mamba")
    with pytest.raises(CheckpointError) as error:
        load_decoder(folder)
    message = str(error.value)
    assert "MambaForCausalLM" in message
    assert "--engine transformers" in message
    for family in FAMILIES:
        assert family.architectures[0] in message


def test_architecture_is_found_by_model_type_when_it_is_not_named(edited: Callable[..., Path]) -> None:
    assert load_config(edited("qwen3", architectures=None)).family == "qwen3"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"hidden_size": "large"}, "wrong kind"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"num_key_value_heads": 4}, "multiple of num_kv_heads"),
        ({"hidden_act": "mish"}, "unknown activation"),
        ({"rope_parameters": {"rope_type": "spiral", "factor": 2}}, "unknown rope_type"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks factor"),
    ],
)
def test_config_that_cannot_be_is_one_line(change: dict[str, Any], part: str, edited: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError) as error:
        load_config(edited("llama", **change))
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_dtype_auto_takes_config_then_weights(edited: Callable[..., Path]) -> None:
    def halve(state: dict[str, torch.Tensor]) -> None:
        for name in state:
            state[name] = state[name].half()

    assert load_decoder(edited("llama", halve, dtype="bfloat16")).dtype == torch.bfloat16
    assert load_decoder(edited("llama", halve, dtype=None)).dtype == torch.float16
    assert load_decoder(edited("llama", halve), dtype="float32").dtype == torch.float32


def test_unknown_dtype_raises(tiny_model: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigError, match="unknown dtype"):
        load_decoder(tiny_model("llama").folder, dtype="float33")


def test_pickled_weights_load_behind_the_flag(tiny_model: Callable[[str], Any], tmp_path: Path) -> None:
    source = tiny_model("gpt-neox")
    torch.save(source.model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((source.folder / "config.json").read_text())
    decoder = load_decoder(tmp_path, allow_pickle=True)
    with torch.no_grad():
        assert torch.allclose(decoder(source.tokens_BT), source.logits_BTV, atol=1e-4)


def test_resolve_model_names_what_it_wants(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    assert resolve_model(tmp_path) == tmp_path
    for name in (tmp_path / "file.txt", tmp_path / "nowhere", "no-such-model", "a/b/c"):
        with pytest.raises(CheckpointError) as error:
            resolve_model(name, offline=True)
        assert str(name) in str(error.value)


def test_hub_id_that_is_not_in_the_cache_offline_is_one_line() -> None:
    with pytest.raises(CheckpointError) as error:
        resolve_model("burnish-tests/no-such-model@abc", offline=True)
    assert "burnish-tests/no-such-model@abc" in str(error.value)
    assert "--offline" in str(error.value)


def test_hub_id_is_downloaded_at_its_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def download(repository: str, *, revision: str | None, allow_patterns: list[str], **others: Any) -> str:
        asked.append((repository, revision, others["local_files_only"], "pytorch_model*.bin" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("org/name@v1.2") == tmp_path
    resolve_model("org/name", revision="abc", offline=True, allow_pickle=True)
    assert asked == [("org/name", "v1.2", False, False), ("org/name", "abc", True, True)]


def test_failing_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **settings: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(CheckpointError) as error:
        resolve_model("org/name@v1")
    assert "org/name@v1" in str(error.value)
    assert "no route" in str(error.value)
    assert "\n" not in str(error.value)


class PackedLinear(nn.Module):
    """Stands for a quantized linear: buffers in GPTQ's orientation, out features last."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.empty(in_features // 8, out_features, dtype=torch.int32, device="meta"))
        self.register_buffer("qzeros", torch.empty(2, out_features // 8, dtype=torch.int32, device="meta"))
        self.register_buffer("scales", torch.empty(2, out_features, dtype=torch.float16, device="meta"))
        self.register_buffer("g_idx", torch.empty(in_features, dtype=torch.int32, device="meta"))


def test_prepare_swaps_linears_and_fused_packed_tensors_are_cut(
    tiny_model: Callable[[str], Any], tmp_path: Path
) -> None:
    source = tiny_model("gpt-neox").folder
    state = load_file(source / "model.safetensors")
    heads, head, hidden = 6, 8, 48
    out = torch.arange(3 * hidden, dtype=torch.int32)
    for layer in range(3):
        module = f"gpt_neox.layers.{layer}.attention.query_key_value"
        del state[f"{module}.weight"], state[f"{module}.bias"]
        state[f"{module}.qweight"] = out.repeat(hidden // 8, 1)
        state[f"{module}.scales"] = out.half().repeat(2, 1)
        state[f"{module}.qzeros"] = out[::8].clone().repeat(2, 1)
        state[f"{module}.g_idx"] = torch.arange(hidden, dtype=torch.int32)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())

    def prepare(decoder: Decoder, hf_config: dict[str, Any]) -> None:
        assert hf_config["model_type"] == "gpt_neox"
        replace_linears(
            decoder,
            lambda name, linear: (
                PackedLinear(linear.out_features, linear.in_features)
                if name.endswith(("q_proj", "k_proj", "v_proj"))
                else None
            ),
        )

    decoder = load_decoder(tmp_path, dtype="bfloat16", prepare=prepare)
    attention = decoder.get_submodule("model.layers.1.self_attn")
    expected = out.view(heads, 3, head)
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        packed = attention.get_submodule(name)
        rows = expected[:, part].reshape(-1)
        assert torch.equal(packed.get_buffer("qweight")[0], rows)
        assert torch.equal(packed.get_buffer("scales")[1], rows.half())
        assert torch.equal(packed.get_buffer("qzeros")[0], rows[::8])
        assert torch.equal(packed.get_buffer("g_idx"), torch.arange(hidden, dtype=torch.int32))


def test_save_refuses_a_model_whose_linears_were_replaced(tiny_model: Callable[[str], Any], tmp_path: Path) -> None:
    decoder = load_decoder(tiny_model("llama").folder)
    replace_linears(decoder, lambda name, linear: PackedLinear(48, 48) if name.endswith("0.self_attn.q_proj") else None)
    with pytest.raises(CheckpointError, match="cannot be saved as dense weights"):
        save_decoder(decoder, tmp_path / "out", source=None)


def test_save_copies_companions_and_drops_quantization(edited: Callable[..., Path], tmp_path: Path) -> None:
    folder = edited("llama", quantization_config={"bits": 4}, my_key="kept")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("")
    decoder = load_decoder(folder)
    out = tmp_path / "out"
    save_decoder(decoder, out, source=folder, dtype="bfloat16")
    record = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in record
    assert record["my_key"] == "kept"
    assert record["dtype"] == "bfloat16"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load_decoder(out).dtype == torch.bfloat16


def test_save_over_the_folder_it_was_loaded_from_works(edited: Callable[..., Path]) -> None:
    folder = edited("gpt2")
    decoder = load_decoder(folder)
    with torch.no_grad():
        decoder.model.norm.weight.mul_(2)
    save_decoder(decoder, folder, source=folder)
    tokens_BT = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(load_decoder(folder)(tokens_BT), decoder(tokens_BT))


def test_stories_model_tells_its_story(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260k"
    decoder = load_decoder(folder)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = tokenizer.encode("Once upon a time").ids
    tokens = tokens if tokens[0] == 1 else [1, *tokens]
    with torch.no_grad():
        for _ in range(30):
            tokens.append(int(decoder(torch.tensor([tokens]))[0, -1].argmax()))
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert tokenizer.decode(tokens).startswith(story)


_MEASURE = """
import pathlib, sys
import torch
from burnish.models.loading import load_decoder

def status(key):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024

load_decoder(sys.argv[1], dtype=sys.argv[2])
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
decoder = load_decoder(sys.argv[3], dtype=sys.argv[2])
weights = sum(parameter.nbytes for parameter in decoder.parameters())
print((status("VmHWM") - before) / weights, weights)
"""
_LARGE: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 16000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 16000,
        "n_embd": 1024,
        "n_layer": 7,
        "n_head": 16,
        "n_positions": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gpt2", "bfloat16")])
def test_peak_memory_of_loading_stays_within_a_fifth_of_the_weights(
    family: str, dtype: str, tiny_model: Callable[[str], Any], tmp_path: Path
) -> None:
    from burnish.models.synth import write_random_checkpoint

    # Twice the bytes in memory for one run, the same for the other: about 300 and 200 MB.
    write_random_checkpoint(_LARGE[family], tmp_path, dtype="bfloat16")
    command = [sys.executable, "-c", _MEASURE, str(tiny_model(family).folder), dtype, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    ratio, weights = result.stdout.split()
    assert int(weights) > 180_000_000
    assert 0.9 < float(ratio) < 1.2
