from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from burnish.compress import rtn
from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import quantized_linears, save_quantized
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.loading import load_model
from burnish.compress.quantized_weight import QuantizedWeight
from burnish.errors import ConfigError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.linears import set_module
from burnish.train.config import TrainConfig
from burnish.train.fake_quant import (
    FakeQuantLinear,
    attach_fake_quant,
    detach_fake_quant,
    fake_quant_modules,
    parent_computes,
)
from burnish.train.lora import LoraConfig
from burnish.train.trainer import train

# N tokens, I in features, O out features

LORA = LoraConfig(rank=3, alpha=6)


def _linear(seed: int = 0) -> nn.Linear:
    linear = nn.Linear(23, 9)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.normal_(generator=generator)
    return linear


def _quantized(linear: nn.Linear, **settings: Any) -> QuantizedWeight:
    return rtn.quantize_weight(linear.weight, **{"bits": 3, "group_size": 10, "symmetric": False, **settings})


def _shuffled(quantized: QuantizedWeight) -> QuantizedWeight:
    """Groups in no plain order, as columns in order of importance leave them."""
    order = torch.randperm(len(quantized.g_idx), generator=torch.Generator().manual_seed(5))
    return replace(quantized, g_idx=quantized.g_idx[order].contiguous())


def _trained_a_little(layer: FakeQuantLinear, *, size: float) -> FakeQuantLinear:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        layer.lora_A.normal_(generator=generator)
        layer.lora_B.normal_(std=size, generator=generator)
        layer.log_gain.normal_(std=0.2, generator=generator)
    return layer


def _same(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    pairs = ((getattr(one, name), getattr(other, name)) for name in ("ints", "scales", "zeros", "g_idx"))
    return all(torch.equal(*pair) for pair in pairs) and one.bits == other.bits and one.group_size == other.group_size


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("group_size", [-1, 10])
def test_begins_as_the_quantized_weight_exactly(bits: int, symmetric: bool, group_size: int, in_order: bool) -> None:
    linear = _linear()
    start = _quantized(linear, bits=bits, symmetric=symmetric, group_size=group_size, scale_search=True)
    # Integers that rounding to nearest would not give, as after GPTQ.
    moved = (
        start.ints.int() + torch.randint(-2, 3, start.ints.shape, generator=torch.Generator().manual_seed(2))
    ).clamp(0, 2**bits - 1)
    start = replace(start, ints=moved.to(torch.uint8))
    start = start if in_order else _shuffled(start)
    layer = FakeQuantLinear(linear, LORA, start)
    assert _same(layer.quantized(), start)
    x_NI = torch.randn(5, 23, generator=torch.Generator().manual_seed(3))
    expected = nn.functional.linear(x_NI, start.dequantize(), linear.bias)
    assert torch.equal(layer(x_NI), expected)


@pytest.mark.parametrize(("group_size", "in_order"), [(-1, True), (10, True), (10, False)])
def test_output_and_gradients_are_those_of_rounding_with_a_straight_through_estimator(
    group_size: int, in_order: bool
) -> None:
    linear = _linear()
    start = _quantized(linear, group_size=group_size)
    start = start if in_order else _shuffled(start)
    layer = _trained_a_little(FakeQuantLinear(linear, LORA, start), size=0.6)
    x_NI = torch.randn(4, 5, 23, generator=torch.Generator().manual_seed(3), requires_grad=True)
    leaves = (x_NI, layer.lora_A, layer.lora_B, layer.log_gain)
    found = torch.autograd.grad(layer(x_NI).square().sum(), leaves)

    columns = start.g_idx.long()
    zeros_OI = start.zeros.float()[:, columns]
    places_OI = layer.places / 128 + layer.scale * layer.lora_B @ layer.lora_A
    inside_OI = places_OI.clamp(-0.5, 7.5)
    levels_OI = inside_OI + (inside_OI.round().clamp(0, 7) - inside_OI).detach()
    scales_OG = start.scales.float() * layer.log_gain.exp()
    scales_OG = scales_OG + (scales_OG.half().float() - scales_OG).detach()
    expected_out = nn.functional.linear(x_NI, (levels_OI - zeros_OI) * scales_OG[:, columns], linear.bias)
    expected = torch.autograd.grad(expected_out.square().sum(), leaves)

    assert (places_OI < -0.5).any()
    assert (places_OI > 7.5).any()
    assert torch.allclose(layer(x_NI), expected_out, rtol=1e-4, atol=1e-4)
    for one, other in zip(found, expected, strict=True):
        # The reference multiplies by exact scales what ours multiplies by stored ones.
        assert torch.allclose(one, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))


def test_what_is_stored_is_what_the_forward_computed_with() -> None:
    linear = _linear()
    layer = _trained_a_little(FakeQuantLinear(linear, LORA, _quantized(linear)), size=0.6)
    x_NI = torch.randn(5, 23, generator=torch.Generator().manual_seed(3))
    stored = GroupQuantizedLinear.from_quantized(layer.quantized(), bias=linear.bias)
    assert not torch.equal(layer.quantized().ints, _quantized(linear).ints)
    assert torch.allclose(stored(x_NI), layer(x_NI), rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.merged_weight(), stored.dequantize())


def test_scales_stay_finite_and_positive_whatever_their_gains() -> None:
    linear = _linear()
    layer = FakeQuantLinear(linear, LORA, _quantized(linear))
    for gain in (-100.0, 100.0):
        with torch.no_grad():
            layer.log_gain.fill_(gain)
        scales = layer.quantized().scales
        assert bool((scales > 0).all() and torch.isfinite(scales).all())


def test_dropout_dora_other_bases_and_other_shapes_are_refused() -> None:
    linear = _linear()
    for config in (LoraConfig(dropout=0.1), LoraConfig(use_dora=True)):
        with pytest.raises(ConfigError, match="needs a dense base"):
            FakeQuantLinear(linear, config, _quantized(linear))
    with pytest.raises(ConfigError, match="needs a dense base"):
        FakeQuantLinear(nn.Identity(), LORA, _quantized(linear))
    with pytest.raises(ConfigError, match="another shape"):
        FakeQuantLinear(nn.Linear(9, 23), LORA, _quantized(linear))


class _Row:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = self.labels = tokens


def _decoder(dtype: torch.dtype = torch.float32) -> Decoder:
    config = ModelConfig(
        family="llama",
        vocab_size=40,
        hidden_size=24,
        intermediate_size=37,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        rotary_dim=6,
        max_position_embeddings=32,
    )
    return Decoder(config, dtype=dtype).initialize(std=0.3, seed=1).eval()


def _rows(count: int = 32) -> list[_Row]:
    generator = torch.Generator().manual_seed(3)
    return [_Row((torch.randint(0, 13, (16,), generator=generator) * 3).tolist()) for _ in range(count)]


def _start(decoder: Decoder, *, bits: int = 2) -> dict[str, QuantizedWeight]:
    linears = [(name, module) for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    return {
        name: rtn.quantize_weight(module.weight, bits=bits, group_size=16, symmetric=False, scale_search=True)
        for name, module in linears
        if name.startswith("model.layers.")
    }


def _logits(decoder: Decoder) -> Tensor:
    with torch.no_grad():
        return decoder(torch.tensor([row.tokens for row in _rows(4)]))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_draws_the_child_to_its_parent_and_the_folder_holds_what_was_trained(
    tmp_path: Path, precision: str, checkpointing: bool
) -> None:
    decoder, parent = _decoder(), _decoder()
    start = _start(decoder)
    names = attach_fake_quant(decoder, start, LoraConfig(rank=8, alpha=16), seed=0)
    assert names == list(fake_quant_modules(decoder))
    with torch.no_grad(), parent_computes(decoder):
        assert torch.equal(_logits(decoder), _logits(parent))
    config = TrainConfig(
        steps=40, micro_batch_size=8, learning_rate=1e-2, precision=precision, gradient_checkpointing=checkpointing
    )  # pyright: ignore[reportArgumentType]
    result = train(decoder, _rows(), config=config, parent=lambda: parent_computes(decoder))
    assert result.steps[-1].loss < 0.6 * result.steps[0].loss
    trained_logits = _logits(decoder)
    trained = detach_fake_quant(decoder)
    assert torch.equal(_logits(decoder), _logits(parent))
    assert any(not torch.equal(trained[name].ints, start[name].ints) for name in names)

    for name, quantized in trained.items():
        set_module(decoder, name, GroupQuantizedLinear.from_quantized(quantized))
    settings = QuantizeConfig(bits=2, group_size=16, symmetric=False)
    save_quantized(decoder, tmp_path / "child", source=None, config=settings)
    stored = load_model(tmp_path / "child", dtype="float32")
    assert all(_same(layer.quantized(), trained[name]) for name, layer in quantized_linears(stored).items())
    assert torch.allclose(_logits(stored), trained_logits, rtol=1e-5, atol=1e-4)


def test_bfloat16_parent_is_trained_on_and_given_back() -> None:
    decoder, parent = _decoder(torch.bfloat16), _decoder(torch.bfloat16)
    attach_fake_quant(decoder, _start(decoder), LoraConfig(rank=8, alpha=16), seed=0)
    config = TrainConfig(steps=30, micro_batch_size=8, learning_rate=1e-2)
    result = train(decoder, _rows(), config=config, parent=lambda: parent_computes(decoder))
    assert result.precision == "bfloat16"
    assert result.steps[-1].loss < 0.7 * result.steps[0].loss
    detach_fake_quant(decoder)
    assert torch.equal(_logits(decoder), _logits(parent))


def test_labels_are_learned_without_a_parent() -> None:
    decoder = _decoder()
    attach_fake_quant(decoder, _start(decoder, bits=4), LoraConfig(rank=8, alpha=16), seed=0)
    rows = [_Row([3, 6, 9, 12] * 4)] * 8
    result = train(decoder, rows, config=TrainConfig(steps=25, micro_batch_size=8, learning_rate=2e-2))
    assert result.steps[-1].loss < 0.7 * result.steps[0].loss


def test_evaluations_during_distillation_are_divergences_too() -> None:
    decoder = _decoder()
    attach_fake_quant(decoder, _start(decoder, bits=8), LORA, seed=0)
    config = TrainConfig(steps=1, micro_batch_size=8, learning_rate=1e-6, precision="float32")
    result = train(decoder, _rows(8), config=config, eval_examples=_rows(8), parent=lambda: parent_computes(decoder))
    assert result.eval[-1].loss == pytest.approx(result.steps[0].loss, rel=1e-2)
    assert result.steps[0].loss < 1e-2
