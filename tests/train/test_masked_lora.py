from __future__ import annotations

import pytest
import torch
from torch import nn

from burnish.errors import ConfigError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig, lora_modules, merge_adapter
from burnish.train.masked_lora import MaskedLoraLinear, attach_masked_lora
from burnish.train.trainer import train


class _Row:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = self.labels = tokens


def _pruned_linear() -> nn.Linear:
    linear = nn.Linear(12, 9)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        linear.weight.normal_(generator=generator)
        linear.weight[torch.rand(9, 12, generator=generator) < 0.5] = 0.0
    return linear


def _pruned_decoder() -> Decoder:
    config = ModelConfig(
        family="llama",
        vocab_size=40,
        hidden_size=24,
        intermediate_size=36,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        rotary_dim=6,
        max_position_embeddings=32,
    )
    decoder = Decoder(config).initialize(std=0.2, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "_proj" in name:
                parameter[torch.rand(parameter.shape, generator=generator) < 0.5] = 0.0
    return decoder


def test_output_and_gradients_are_those_of_the_masked_sum() -> None:
    linear = _pruned_linear()
    masked = MaskedLoraLinear(linear, LoraConfig(rank=3, alpha=6))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 5, 12, generator=generator, requires_grad=True)
    with torch.no_grad():
        masked.lora_A.normal_(generator=generator)
        masked.lora_B.normal_(generator=generator)
    leaves = (x, masked.lora_A, masked.lora_B)
    found = torch.autograd.grad(masked(x).square().sum(), leaves)
    weight = linear.weight + (linear.weight != 0) * (masked.lora_B @ masked.lora_A) * 2
    expected_out = nn.functional.linear(x, weight, linear.bias)
    expected = torch.autograd.grad(expected_out.square().sum(), leaves)
    assert torch.allclose(masked(x), expected_out, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)
    assert torch.allclose(masked.merged_weight(), weight, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_lowers_the_loss_and_the_merged_model_keeps_every_zero(precision: str) -> None:
    decoder = _pruned_decoder()
    zeros = {name: value == 0 for name, value in decoder.named_parameters() if "_proj" in name}
    before = {name: value.detach().clone() for name, value in decoder.named_parameters()}
    names = attach_masked_lora(decoder, LoraConfig(rank=4, alpha=8), seed=0)
    assert len(names) == 14
    assert all(type(module) is MaskedLoraLinear for module in lora_modules(decoder).values())
    generator = torch.Generator().manual_seed(3)
    rows = [_Row((torch.randint(0, 6, (16,), generator=generator) * 3).tolist()) for _ in range(16)]
    config = TrainConfig(steps=15, micro_batch_size=8, learning_rate=2e-2, precision=precision)  # pyright: ignore
    result = train(decoder, rows, config=config)
    assert result.steps[-1].loss < 0.8 * result.steps[0].loss
    with torch.no_grad():
        tokens = torch.tensor([rows[0].tokens])
        carried = decoder(tokens)
        assert merge_adapter(decoder) == names
        assert torch.allclose(decoder(tokens), carried, atol=1e-4)
    for name, value in decoder.named_parameters():
        if name in zeros:
            assert torch.equal(value == 0, zeros[name]), name
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name]), name


def test_dropout_dora_and_bases_that_are_not_dense_are_refused() -> None:
    for config in (LoraConfig(dropout=0.1), LoraConfig(use_dora=True)):
        with pytest.raises(ConfigError, match="masked adapter needs a dense base"):
            MaskedLoraLinear(nn.Linear(4, 4), config)
    with pytest.raises(ConfigError, match="masked adapter needs a dense base"):
        MaskedLoraLinear(nn.Identity(), LoraConfig())
