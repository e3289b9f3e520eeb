from __future__ import annotations

import pytest
import torch
from family_decoders import DECODERS, family_examples, make_family

from burnish.compress.channel_scales import ScaleSite, fold_scale, scale_sites
from burnish.models.decoder import Decoder


def _scaled(decoder: Decoder, *, spread: float = 1.0) -> Decoder:
    """Every site of every block scaled by random factors, in place."""
    generator = torch.Generator().manual_seed(11)
    for block in decoder.model.layers:
        for site in scale_sites(decoder.config):
            source = block.get_parameter(f"{site.source}.weight")
            fold_scale(block, site, (spread * torch.randn(source.shape[0], generator=generator)).exp())
    return decoder


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_scaled_model_computes_what_it_did(name: str) -> None:
    parent, child = make_family(name), _scaled(make_family(name))
    tokens = torch.tensor(family_examples())
    expected = parent(tokens)
    assert expected.std() > 0.1
    assert (child(tokens) - expected).abs().max() < 1e-4
    changed = {key for key, value in child.state_dict().items() if not torch.equal(value, parent.state_dict()[key])}
    assert any("v_proj.weight" in key for key in changed)
    assert not any(key.startswith(("model.embed", "lm_head", "model.norm")) for key in changed)


@torch.no_grad()
def test_sixteen_bit_norms_add_no_error_of_their_own() -> None:
    decoder = make_family("gemma2").to(torch.bfloat16)
    block, site = decoder.model.layers[0], scale_sites(decoder.config)[0]
    linear = block.get_submodule(site.readers[0])
    assert isinstance(linear, torch.nn.Linear)
    linear.weight.data = linear.weight.float()
    x = torch.randn(50, 48, generator=torch.Generator().manual_seed(1))
    norm = block.get_submodule(site.source).float()
    expected = linear(norm(x))
    norm.to(torch.bfloat16)
    fold_scale(block, site, torch.linspace(0.3, 3.0, 48))
    assert torch.allclose(linear(norm.float()(x)), expected, atol=1e-4)


@torch.no_grad()
def test_channel_that_a_norm_silences_stays_as_it_is() -> None:
    decoder = make_family("llama")
    block, site = decoder.model.layers[0], scale_sites(decoder.config)[0]
    norm, reader = block.get_parameter("input_layernorm.weight"), block.get_parameter("self_attn.q_proj.weight")
    norm[3] = 0.0
    before = reader.clone()
    fold_scale(block, site, torch.full((48,), 2.0))
    assert norm[3] == 0.0
    assert torch.equal(reader[:, 3], before[:, 3])
    assert torch.equal(reader[:, 4], 2 * before[:, 4])


def test_shared_heads_spread_and_pool() -> None:
    site = ScaleSite(source="v", readers=("o",), repeats=3, width=2)
    assert site.spread(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    assert site.pooled(torch.tensor([1.0, 2, 3, 4, 5, 6])).tolist() == [3.0, 4.0]
