"""compressed-tensors folders: ours read back bit for bit, by the reference library, and by transformers beside it.

The library is optional: without it only what needs no other program runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, load_in_transformers, random_rows, write_family

from burnish.compress.config import MixedPrecision, QuantizeConfig
from burnish.compress.folder_formats import quantize_for_folder
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.int8_linear import Int8Linear
from burnish.compress.loading import load_model
from burnish.errors import CheckpointError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder, save_decoder

TOKENS = torch.tensor(random_rows(3, 24))
SMOOTH = QuantizeConfig(method="smoothquant", bits=8, group_size=-1)
ROUNDED = QuantizeConfig(method="rtn", bits=4, group_size=-1, format="compressed-tensors")
GROUPS = QuantizeConfig(method="gptq", bits=4, group_size=16, format="compressed-tensors", symmetric=False)
TWO_BITS = QuantizeConfig(method="rtn", bits=2, group_size=8, format="compressed-tensors")


def make(
    folder: Path, family: str, config: QuantizeConfig, *, mixed: MixedPrecision | None = None
) -> tuple[Decoder, Path]:
    """A quantized tiny model and the folder it was written to."""
    dense = folder / "dense"
    if not dense.exists():
        write_family(family, dense)
    child = load_decoder(dense, dtype="float32")
    rows = random_rows() if config.needs_calibration or mixed is not None else None
    result, save = quantize_for_folder(child, rows, config, mixed=mixed)
    out = folder / "out"
    save(out, dense)
    assert result.num_weights > 0
    return child, out


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found = model(TOKENS)
    return found.logits if hasattr(found, "logits") else found


@pytest.mark.parametrize("family", FAMILIES)
def test_w8a8_loads_as_the_layers_the_engine_runs(family: str, tmp_path: Path) -> None:
    child, out = make(tmp_path, family, SMOOTH)
    loaded = load_model(out, dtype="float32")
    assert torch.equal(logits(loaded), logits(child))
    blocks = [module for module in loaded.model.modules() if isinstance(module, (Int8Linear, torch.nn.Linear))]
    assert {type(module) for module in blocks} == {Int8Linear}


@pytest.mark.parametrize(
    ("family", "config"),
    [(family, ROUNDED) for family in FAMILIES] + [(family, TWO_BITS) for family in ("llama-biases", "gemma2", "qwen3")],
    ids=lambda value: value if isinstance(value, str) else f"{value.bits}-bit",
)
def test_packed_weights_come_back(family: str, config: QuantizeConfig, tmp_path: Path) -> None:
    child, out = make(tmp_path, family, config)
    loaded = load_model(out, dtype="float32")
    assert torch.equal(logits(loaded), logits(child))
    assert any(isinstance(module, GroupQuantizedLinear) for module in loaded.modules())


@pytest.mark.parametrize("family", ["llama-biases", "gpt-neox", "gemma2"])
def test_zero_points_come_back(family: str, tmp_path: Path) -> None:
    child, out = make(tmp_path, family, GROUPS)
    assert torch.equal(logits(load_model(out, dtype="float32")), logits(child))


@pytest.mark.parametrize("config", [SMOOTH, ROUNDED], ids=["w8a8", "w4a16"])
@pytest.mark.parametrize("family", ["llama-grouped", "qwen2-tied", "codegen", "gpt2"])
def test_embeddings_in_eight_bits(family: str, config: QuantizeConfig, tmp_path: Path) -> None:
    plain, _ = make(tmp_path, family, config)
    wanted = logits(plain)
    settings = {**config.to_dict(), "embeddings": True}
    _, out = make(tmp_path, family, QuantizeConfig(**settings))
    loaded = load_model(out, dtype="float32")
    assert isinstance(loaded.lm_head, Int8Linear)
    assert float((logits(loaded) - wanted).norm() / wanted.norm()) < 0.05
    files = load_file(out / "model.safetensors")
    embeddings = [name for name, tensor in files.items() if tensor.dtype == torch.int8 and tensor.shape[0] == 101]
    assert len(embeddings) == (1 if "tied" in family or family == "gpt2" else 2)


def test_widths_are_written_as_groups_of_their_own(tmp_path: Path) -> None:
    config = QuantizeConfig(method="rtn", bits=4, group_size=-1, format="compressed-tensors")
    child, out = make(
        tmp_path, "llama-grouped", config, mixed=MixedPrecision(target_bits=5.5, choices=(4, 8), tokens=64)
    )
    assert torch.equal(logits(load_model(out, dtype="float32")), logits(child))
    record = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert {scheme["weights"]["num_bits"] for scheme in record["config_groups"].values()} == {4, 8}


def test_a_folder_of_integers_without_rounded_activations_stays_exact(tmp_path: Path) -> None:
    """W8A16, which others write unpacked: weights as they are, activations not rounded."""
    child, out = make(tmp_path, "llama-grouped", QuantizeConfig(method="w8a8", bits=8, group_size=-1))
    path = out / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    path.write_text(json.dumps(record), encoding="utf-8")
    loaded = load_model(out, dtype="float32")
    for name, module in child.named_modules():
        if isinstance(module, Int8Linear):
            other = loaded.get_submodule(name)
            assert isinstance(other, GroupQuantizedLinear)
            assert torch.equal(other.dequantize(), module.dequantize())


def test_one_scale_per_matrix_and_static_activations(tmp_path: Path) -> None:
    """As older recipes of W8A8 have it; activations are rounded token by token all the same."""
    child, out = make(tmp_path, "llama-grouped", QuantizeConfig(method="w8a8", bits=8, group_size=-1))
    weights = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    weights[f"{name}.weight_scale"] = torch.tensor([0.5])
    weights[f"{name}.input_scale"] = torch.tensor([0.1])
    save_file(weights, out / "model.safetensors")
    loaded, before = load_model(out, dtype="float32").get_submodule(name), child.get_submodule(name)
    assert isinstance(loaded, Int8Linear)
    assert isinstance(before, Int8Linear)
    assert torch.equal(loaded.weight, before.weight)
    assert bool((loaded.weight_scale == 0.5).all())


def test_groups_in_another_order_are_followed(tmp_path: Path) -> None:
    """`weight_g_idx`, which older versions of the library wrote."""
    _, out = make(tmp_path, "llama-grouped", TWO_BITS)
    weights = load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj"
    before = load_model(out, dtype="float32").get_submodule(name)
    weights[f"{name}.weight_g_idx"] = torch.arange(48, dtype=torch.int32).flip(0) // 8
    save_file(weights, out / "model.safetensors")
    after = load_model(out, dtype="float32").get_submodule(name)
    assert isinstance(before, GroupQuantizedLinear)
    assert isinstance(after, GroupQuantizedLinear)
    expected, found = before.quantized(), after.quantized()
    assert torch.equal(found.ints, expected.ints)
    assert torch.equal(found.g_idx, expected.g_idx.flip(0))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}, "cannot be read"),
        ({"weights": {"num_bits": 8, "type": "int", "strategy": "block"}}, "cannot be read"),
        ({"format": "nvfp4-pack-quantized"}, "nvfp4"),
        ({"targets": ["re:.*other.*"]}, "no group of config.json names it"),
        (
            {"weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}},
            "no zero points",
        ),
    ],
)
def test_other_kinds_are_refused(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    _, out = make(tmp_path, "llama-grouped", QuantizeConfig(method="w8a8", bits=8, group_size=-1))
    path = out / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["quantization_config"]["config_groups"]["group_0"] |= change
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(CheckpointError, match=problem):
        load_model(out)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_packed", "weight_shape"])
def test_damaged_folders_are_one_line(suffix: str, tmp_path: Path) -> None:
    _, out = make(tmp_path, "llama-grouped", ROUNDED)
    path = out / "model.safetensors"
    weights = load_file(path)
    name = f"model.layers.1.mlp.up_proj.{suffix}"
    weights[name] = weights[name][:-1].clone()
    save_file(weights, path)
    with pytest.raises(CheckpointError):
        load_model(out)


def test_parts_that_end_inside_a_word_are_refused_not_broken(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="end inside a packed word"):
        make(tmp_path, "phi3", GROUPS)


# ---- beside other programs -------------------------------------------------------------------------------------------


def exact_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the library divide a token's range by 127, as we do, and not by 127.5."""
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    plain = forward.compute_dynamic_scales_and_zp

    def scaled(*args: Any, **kwargs: Any) -> Any:
        scale, zero = plain(*args, **kwargs)
        return scale * (127.5 / 127.0), zero

    monkeypatch.setattr(forward, "compute_dynamic_scales_and_zp", scaled)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_transformers_computes_the_same_from_w8a8(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    exact_activations(monkeypatch)
    _, out = make(tmp_path, family, SMOOTH)
    found, expected = logits(load_in_transformers(out)), logits(load_model(out, dtype="float32"))
    # An activation at the edge between two integers may go the other way, and then moves what follows a little.
    off = (found - expected).abs()
    assert float(off.median()) < 2e-3
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.95


@pytest.mark.parametrize("family", ["llama-biases", "qwen2-tied", "phi3", "bloom", "codegen", "gemma2", "gpt-neox"])
def test_transformers_computes_the_same_from_packed_weights(family: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    _, out = make(tmp_path, family, ROUNDED)
    found, expected = logits(load_in_transformers(out)), logits(load_model(out, dtype="float32"))
    assert torch.allclose(found, expected, atol=1e-4)


def test_transformers_computes_the_same_from_groups(tmp_path: Path) -> None:
    """Groups that divide every size, as other programs ask."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    settings: dict[str, Any] = {"vocab_size": 101, "num_layers": 2, "max_position_embeddings": 64, "rotary_dim": 16}
    dense = Decoder(ModelConfig(family="llama", **settings, **sizes), dtype=torch.float32).initialize(std=0.15, seed=1)
    save_decoder(dense, tmp_path / "dense", source=None)
    config = QuantizeConfig(method="gptq", bits=4, group_size=32, format="compressed-tensors")
    _, out = make(tmp_path, "", config)
    found, expected = logits(load_in_transformers(out)), logits(load_model(out, dtype="float32"))
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_library_unpacks_what_we_packed(tmp_path: Path) -> None:
    """Every width, with zero points, without transformers in between."""
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    for bits in (2, 4, 8):
        config = QuantizeConfig(method="rtn", bits=bits, group_size=8, format="compressed-tensors", symmetric=False)
        child, out = make(tmp_path / str(bits), "llama-grouped", config)
        record = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        scheme = schemes.QuantizationScheme(**record["config_groups"]["group_0"])
        files, prefix = load_file(out / "model.safetensors"), "model.layers.0.self_attn.o_proj."
        stored = {name.removeprefix(prefix): tensor for name, tensor in files.items() if name.startswith(prefix)}
        stored["weight_scale"] = stored["weight_scale"].float()
        made = library.PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
        layer = child.get_submodule(prefix[:-1])
        assert isinstance(layer, GroupQuantizedLinear)
        assert torch.allclose(made.float(), layer.dequantize(), atol=1e-6)
