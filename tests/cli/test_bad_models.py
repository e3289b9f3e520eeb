"""Models and adapters that cannot be used: one clear line, exit code 2."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from command_line import Cli
from safetensors.torch import load_file, save_file

from tiny_llama import write_tiny_llama


def generate(cli: Cli, model: object, *options: object):
    return cli("generate", model, "--prompt", "SELECT", "--max-tokens", 2, *options)


def test_missing_folder_names_it(cli: Cli) -> None:
    generate(cli, "./nowhere").fails(2, "nowhere", "no model")


def test_unknown_hub_id_offline_names_it(cli: Cli) -> None:
    generate(cli, "someone/something", "--offline").fails(2, "someone/something")


def test_misspelt_bundled_name_is_guessed(cli: Cli) -> None:
    generate(cli, "burnish-sql-bass").fails(2, "burnish-sql-bass", "burnish-sql-base")


def test_file_instead_of_a_folder_names_the_folder(cli: Cli, tiny: Path) -> None:
    generate(cli, tiny / "config.json").fails(2, "config.json is a file", f"Give its folder: {tiny}")


def test_folder_without_config_says_so(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    generate(cli, tmp_path / "empty").fails(2, "config.json")


@pytest.mark.parametrize("text", ["{", "[]", "null", "\x00\x01"])
def test_config_that_is_no_json_object_names_the_file(cli: Cli, broken: Path, text: str) -> None:
    (broken / "config.json").write_text(text)
    generate(cli, broken).fails(2, "config.json")


def test_unknown_architecture_lists_the_known_and_offers_transformers(cli: Cli, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config |= {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
    (broken / "config.json").write_text(json.dumps(config))
    generate(cli, broken).fails(2, "MambaForCausalLM", "LlamaForCausalLM", "--engine transformers")


def test_config_without_sizes_names_the_key(cli: Cli, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    del config["hidden_size"]
    (broken / "config.json").write_text(json.dumps(config))
    generate(cli, broken).fails(2, "hidden_size")


@pytest.mark.parametrize("value", ["many", -1, 0, None, 3.5])
def test_config_with_a_wrong_size_names_the_key(cli: Cli, broken: Path, value: object) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": value}))
    generate(cli, broken).fails(2, "config.json", "layers")


@pytest.mark.parametrize("keep", [0, 4, 100, 100_000])
def test_truncated_safetensors_are_recognised(cli: Cli, broken: Path, keep: int) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    generate(cli, broken).fails(2, "model.safetensors", "truncated")


def test_bad_header_names_the_file(cli: Cli, broken: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", 20) + b"this is not a header" + b"\0" * 100)
    generate(cli, broken).fails(2, "model.safetensors", "header")


def test_huge_header_length_names_the_file(cli: Cli, broken: Path) -> None:
    (broken / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    generate(cli, broken).fails(2, "model.safetensors")


def test_wrong_shapes_name_the_tensor_and_both_shapes(cli: Cli, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    generate(cli, broken).fails(2, "model.safetensors", "mlp", "[64, 32]", "[80, 32]")


def test_missing_tensor_is_named(cli: Cli, broken: Path) -> None:
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    weights.unlink()
    save_file(tensors, weights, metadata={"format": "pt"})
    generate(cli, broken).fails(2, "lacks", "model.layers.1.mlp.up_proj.weight")


def test_left_over_tensor_is_named(cli: Cli, broken: Path) -> None:
    weights = broken / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors["model.norm.weight"].clone()
    weights.unlink()
    save_file(tensors, weights, metadata={"format": "pt"})
    generate(cli, broken).fails(2, "no place", "model.layers.7.mlp.up_proj.weight")


def test_folder_without_weights_says_so(cli: Cli, broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    generate(cli, broken).fails(2, "no weights", "safetensors")


def test_pickled_weights_need_their_flag(cli: Cli, broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"not a pickle")
    generate(cli, broken).fails(2, "--allow-pickle")
    generate(cli, broken, "--allow-pickle").fails(2, "pytorch_model.bin")


def test_folder_without_a_tokenizer_says_so(cli: Cli, broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    cli("chat", broken, stdin="hello\n").fails(2, "tokenizer")
    generate(cli, broken).fails(2, "tokenizer")


def test_broken_tokenizer_names_the_file(cli: Cli, broken: Path) -> None:
    (broken / "tokenizer.json").write_text('{"model": 3}')
    generate(cli, broken).fails(2, "tokenizer.json")


def test_adapter_for_another_shape_is_refused(cli: Cli, adapter: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "wide", hidden=48)
    generate(cli, other, "--adapter", adapter).fails(2, "base")
    cli("merge", adapter, "--base", other, "--out", tmp_path / "out").fails(2, "base")


def test_adapter_for_other_weights_is_refused(cli: Cli, adapter: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other", seed=5)
    generate(cli, other, "--adapter", adapter).fails(2, "base")
    cli("merge", adapter, "--base", other, "--out", tmp_path / "out").fails(2, "base")


def test_adapter_without_weights_names_the_file(cli: Cli, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(adapter / "adapter_config.json", bare)
    generate(cli, tiny, "--adapter", bare).fails(2, "adapter_model.safetensors")


def test_folder_that_is_no_adapter_says_what_is_missing(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    generate(cli, tiny, "--adapter", tiny).fails(2, "adapter_config.json")
    generate(cli, tiny, "--adapter", tmp_path / "nowhere").fails(2, "nowhere")
    cli("merge", tiny, "--out", tmp_path / "out").fails(2, "not an adapter")
    cli("merge", tmp_path / "nowhere", "--out", tmp_path / "out").fails(2, "nowhere")


def test_truncated_adapter_names_the_file(cli: Cli, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(adapter, tmp_path / "cut"))
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    generate(cli, tiny, "--adapter", cut).fails(2, "adapter_model.safetensors", "truncated")


def test_adapter_as_adapter_of_an_adapter_is_refused(cli: Cli, adapter: Path) -> None:
    generate(cli, adapter, "--adapter", adapter).fails(2, "is an adapter")


def test_adapter_whose_base_is_gone_names_it(cli: Cli, adapter: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(config))
    generate(cli, moved).fails(2, "gone")
    cli("merge", moved, "--out", tmp_path / "out").fails(2, "gone")


def test_corrupt_manifest_names_the_file(cli: Cli, broken: Path, tmp_path: Path) -> None:
    (broken / "burnish.json").write_text("{")
    cli("quantize", broken, "--out", tmp_path / "q").fails(2, "burnish.json")
