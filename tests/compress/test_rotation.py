from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_decoders import DECODERS, family_examples, make_family

from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import save_quantized
from burnish.compress.loading import load_model
from burnish.compress.quantize import quantize_model
from burnish.compress.rotation import random_rotation, rotate_model
from burnish.errors import CompressionError

ROTATABLE = ("llama", "llama-biases", "llama-tied", "mistral", "qwen2", "qwen3", "phi3")


@pytest.mark.parametrize("name", ROTATABLE)
@torch.no_grad()
def test_rotated_model_computes_what_it_did(name: str) -> None:
    parent, child = make_family(name), make_family(name)
    rotate_model(child)
    tokens = torch.tensor(family_examples())
    expected = parent(tokens)
    assert expected.std() > 0.1
    assert (child(tokens) - expected).abs().max() < 1e-4
    assert child.lm_head is not None
    assert not child.config.tie_word_embeddings
    assert not torch.allclose(child.model.embed_tokens.weight, parent.model.embed_tokens.weight, atol=0.1)
    assert set(child.state_dict()) == set(child.config.parameter_shapes())


@pytest.mark.parametrize("name", sorted(set(DECODERS) - set(ROTATABLE)))
def test_model_whose_function_would_change_is_refused(name: str) -> None:
    with pytest.raises(CompressionError, match="cannot be rotated"):
        rotate_model(make_family(name))


@pytest.mark.parametrize("width", [1, 7, 48, 64, 96])
def test_rotation_is_orthogonal_and_even(width: int) -> None:
    rotation = random_rotation(width, torch.Generator().manual_seed(0))
    assert torch.allclose(rotation @ rotation.t(), torch.eye(width), atol=1e-5)
    power = width & -width
    assert rotation.abs().max() <= power**-0.5 + 1e-6


@torch.no_grad()
def test_rotation_spreads_a_channel_that_stands_out() -> None:
    decoder = make_family("llama")
    for block in decoder.model.layers:
        block.get_parameter("mlp.up_proj.weight")[:, 5] *= 30.0
    weight = decoder.get_parameter("model.layers.0.mlp.up_proj.weight")
    before = float(weight.abs().max() / weight.std())
    rotate_model(decoder)
    assert float(weight.abs().max() / weight.std()) < 0.8 * before


@torch.no_grad()
def test_rotated_tied_child_is_read_back(tmp_path: Path) -> None:
    decoder = make_family("llama-tied")
    config = QuantizeConfig(bits=8, group_size=16, rotate=True)
    quantize_model(decoder, family_examples(), config)
    save_quantized(decoder, tmp_path, source=None, config=config)
    tokens = torch.tensor(family_examples())
    loaded = load_model(tmp_path, dtype="float32")
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded(tokens), decoder(tokens))
    assert (loaded(tokens) - make_family("llama-tied")(tokens)).abs().max() < 0.2
