"""NF4, FP4 and LLM.int8() folders: read back exactly, and what bitsandbytes itself makes of them.

bitsandbytes is optional: without it only what needs no other program runs.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import FAMILIES, random_rows, write_family
from transformers import AutoModelForCausalLM

from burnish.compress.config import MixedPrecision, QuantizeConfig
from burnish.compress.folder_formats import quantize_for_folder
from burnish.compress.loading import load_model
from burnish.errors import CompressionError, ConfigError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder, save_decoder

CONFIGS = {
    "nf4": QuantizeConfig(method="nf4", bits=4, group_size=64),
    "nf4-plain": QuantizeConfig(method="nf4", bits=4, group_size=128, double_quant=False),
    "fp4": QuantizeConfig(method="fp4", bits=4, group_size=64),
    "int8": QuantizeConfig(method="llm.int8", bits=8, group_size=-1),
}
LARGEST_ERROR = {"nf4": 0.15, "nf4-plain": 0.16, "fp4": 0.2, "int8": 0.02}
TOKENS = torch.tensor(random_rows(3, 24))


def make(folder: Path, dense: Path, config: QuantizeConfig) -> tuple[Decoder, Path, float]:
    child = load_decoder(dense, dtype="float32")
    result, save = quantize_for_folder(child, None, config)
    save(folder / "out", dense)
    return child, folder / "out", max(layer.error for layer in result.layers)


def even_sizes(folder: Path) -> Path:
    """A Llama whose sizes bitsandbytes' kernels take."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    settings: dict[str, Any] = {"vocab_size": 101, "num_layers": 2, "max_position_embeddings": 64, "rotary_dim": 32}
    config = ModelConfig(family="llama", **settings, **sizes)
    save_decoder(Decoder(config, dtype=torch.float32).initialize(std=0.15, seed=1), folder, source=None)
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_back_is_what_the_codes_stand_for(family: str, kind: str, tmp_path: Path) -> None:
    child, out, error = make(tmp_path, write_family(family, tmp_path / "dense"), CONFIGS[kind])
    with torch.no_grad():
        assert torch.equal(load_model(out, dtype="float32")(TOKENS), child(TOKENS))
    assert 0.0 < error < LARGEST_ERROR[kind]
    assert any(tensor.dtype == torch.uint8 for tensor in load_file(out / "model.safetensors").values())


@pytest.mark.parametrize("kind", CONFIGS)
def test_constant_and_zero_weights_are_fine(kind: str, tmp_path: Path) -> None:
    dense = load_decoder(even_sizes(tmp_path / "even"), dtype="float32")
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight.zero_()
        dense.model.layers[1].mlp.up_proj.weight.fill_(0.25)
    save_decoder(dense, tmp_path / "dense", source=None)
    _, out, _ = make(tmp_path, tmp_path / "dense", CONFIGS[kind])
    loaded = load_model(out, dtype="float32")
    assert not bool(loaded.model.layers[0].mlp.up_proj.weight.any())
    assert torch.allclose(loaded.model.layers[1].mlp.up_proj.weight, torch.tensor(0.25), rtol=0.02)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bad_weights_are_named(kind: str, tmp_path: Path) -> None:
    child = load_decoder(even_sizes(tmp_path / "dense"), dtype="float32")
    with torch.no_grad():
        child.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CompressionError, match=r"model\.layers\.1\.mlp\.down_proj"):
        quantize_for_folder(child, None, CONFIGS[kind])


def test_one_width_takes_no_budget(tmp_path: Path) -> None:
    child = load_decoder(even_sizes(tmp_path / "dense"), dtype="float32")
    with pytest.raises(ConfigError, match="one width for all layers"):
        quantize_for_folder(child, random_rows(), CONFIGS["nf4"], mixed=MixedPrecision(target_bits=5.0))


# ---- beside bitsandbytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_bitsandbytes_loads_the_very_weights(kind: str, tmp_path: Path) -> None:
    library = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    _, out, _ = make(tmp_path, even_sizes(tmp_path / "dense"), CONFIGS[kind])
    ours = load_model(out, dtype="float32")
    with contextlib.redirect_stderr(io.StringIO()):
        theirs: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, device_map={"": "cpu"})
    for name, module in theirs.named_modules():
        if isinstance(module, library.nn.Linear4bit):
            weight = library.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, library.nn.Linear8bitLt):
            weight = module.weight.data.float() * (module.weight.SCB.float() / 127.0)[:, None]
        else:
            continue
        assert torch.allclose(weight.float(), ours.get_parameter(f"{name}.weight"), atol=1e-6), name
    with torch.no_grad():
        found, expected = theirs(TOKENS).logits.float(), ours(TOKENS)
    # Its kernels compute in 16 bits, and its 8-bit ones round activations too.
    assert float((found - expected).norm() / expected.norm()) < 0.05
