from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from family_decoders import DECODERS, family_examples, make_family
from torch import Tensor

from burnish.compress import awq
from burnish.compress.calibration import BlockWalk, make_batches
from burnish.compress.channel_scales import ScaleSite
from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import save_quantized
from burnish.compress.loading import load_model
from burnish.compress.quantize import quantize_model
from burnish.errors import CompressionError, ConfigError


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_scaled_blocks_compute_what_they_did(name: str) -> None:
    parent, child = make_family(name), make_family(name)
    batches = make_batches(family_examples(), vocab_size=96, max_length=64, batch_tokens=4096)
    walk = BlockWalk(child, batches)
    config = QuantizeConfig(method="awq", bits=3, group_size=16, scale_search=False)
    for layer, block in enumerate(child.model.layers):
        awq.scale_block(walk, layer, block, model=child.config, config=config, widths={})
        walk.advance(layer, block)
    tokens = torch.tensor(family_examples())
    assert (child(tokens) - parent(tokens)).abs().max() < 1e-4
    changed = [key for key, value in child.state_dict().items() if not torch.equal(value, parent.state_dict()[key])]
    assert any("o_proj" in key for key in changed)


@pytest.mark.parametrize("method", ["awq", "awq-gptq"])
@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "gemma2", "gpt_neox", "falcon"])
@torch.no_grad()
def test_child_is_saved_with_its_folded_norms(name: str, method: str, tmp_path: Path) -> None:
    decoder = make_family(name)
    config = QuantizeConfig(method=method, bits=4, group_size=16)
    quantize_model(decoder, family_examples(), config)
    save_quantized(decoder, tmp_path, source=None, config=config)
    loaded = load_model(tmp_path, dtype="float32")
    tokens = torch.tensor(family_examples())
    assert torch.equal(loaded(tokens), decoder(tokens))
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(loaded.get_parameter(norm), make_family(name).get_parameter(norm))


def test_loud_channel_gets_the_larger_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 16, generator=generator)
    loud = torch.ones(16)
    loud[5] = 400.0
    site = ScaleSite(source="norm", readers=("q",))

    def to_whole_numbers(weight: Tensor) -> Tensor:
        return weight.round()

    scale = awq.search_scale([weight], torch.diag(loud), site, rounders=[to_whole_numbers])
    assert scale.argmax() == 5
    assert scale[5] > 3 * scale[4]


def test_no_scaling_is_kept_where_nothing_is_lost() -> None:
    site = ScaleSite(source="norm", readers=("q",))
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    hessian = torch.diag(torch.tensor([1.0, 9.0, 0.0, 4.0]))
    scale = awq.search_scale([weight], hessian, site, rounders=[lambda weight: weight])
    assert torch.equal(scale, torch.ones(4))


@pytest.mark.parametrize("value", [0.0, 0.125])
def test_constant_weights_get_an_answer(value: float) -> None:
    decoder = make_family("gpt2")
    decoder.get_parameter("model.layers.0.mlp.up_proj.weight").data.fill_(value)
    decoder.get_parameter("model.layers.1.self_attn.v_proj.weight").data.fill_(value)
    quantize_model(decoder, family_examples(), QuantizeConfig(method="awq", bits=4, group_size=16))
    assert torch.isfinite(decoder(torch.tensor(family_examples()))).all()


@pytest.mark.parametrize("options", [{"method": "awq"}, {"method": "gptq", "rotate": True}])
def test_damaged_weights_are_refused_by_layer(options: dict[str, Any]) -> None:
    decoder = make_family("llama")
    decoder.get_parameter("model.layers.1.self_attn.o_proj.weight").data[0, 0] = math.nan
    with pytest.raises(CompressionError, match=r"model\.layers\.1\.self_attn\.o_proj holds 1 NaN"):
        quantize_model(decoder, family_examples(), QuantizeConfig(**options))


@pytest.mark.parametrize("method", ["awq", "awq-gptq"])
def test_calibration_is_needed(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} needs calibration text"):
        quantize_model(make_family("llama"), None, QuantizeConfig(method=method))


@pytest.mark.parametrize("method", ["awq", "awq-gptq"])
def test_activations_that_overflow_are_refused_by_layer(method: str) -> None:
    decoder = make_family("llama-biases")
    with torch.no_grad():
        decoder.get_parameter("model.layers.1.input_layernorm.weight").fill_(3e38)
    with pytest.raises(CompressionError, match=r"activations of model\.layers\.1\.\S+ are NaN or infinite"):
        quantize_model(decoder, family_examples(), QuantizeConfig(method=method, bits=4, group_size=16))
