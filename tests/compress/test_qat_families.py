"""Quantization-aware training of every family: sizes that nothing divides, tied and fused linears, biases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, random_rows, write_family

from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import can_store, quantized_linears, save_quantized
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.loading import load_model
from burnish.compress.quantize import quantize_model
from burnish.models.linears import set_module
from burnish.models.loading import load_decoder
from burnish.train.config import TrainConfig
from burnish.train.fake_quant import attach_fake_quant, detach_fake_quant, parent_computes
from burnish.train.lora import LoraConfig
from burnish.train.trainer import train


class _Row:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = self.labels = tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_hybrid_is_nearer_to_the_parent_and_stored_as_it_was_trained(family: str, tmp_path: Path) -> None:
    folder = write_family(family, tmp_path / "parent")
    parent, child = (load_decoder(folder, dtype="float32") for _ in range(2))
    rows = random_rows()
    config = QuantizeConfig(bits=4, group_size=16)
    quantize_model(child, rows, config)
    start = {name: layer.quantized() for name, layer in quantized_linears(child).items()}
    attach_fake_quant(parent, start, LoraConfig(rank=4, alpha=8), seed=0)
    settings = TrainConfig(steps=15, micro_batch_size=6, learning_rate=1e-2, precision="float32")
    result = train(parent, [_Row(row) for row in rows], config=settings, parent=lambda: parent_computes(parent))
    assert result.steps[-1].loss < 0.9 * result.steps[0].loss

    tokens = torch.tensor(rows[:2])
    with torch.no_grad():
        trained_logits = parent(tokens)
    for name, quantized in detach_fake_quant(parent).items():
        bias = child.get_submodule(name).bias
        assert bias is None or isinstance(bias, torch.Tensor)
        set_module(child, name, GroupQuantizedLinear.from_quantized(quantized, bias=bias))
    with torch.no_grad():
        assert torch.equal(parent(tokens), load_decoder(folder, dtype="float32")(tokens))
        assert torch.allclose(child(tokens), trained_logits, rtol=1e-4, atol=1e-4)
    if not all(can_store(parent.config, name, config.bits) for name in start):
        return  # parts of its fused linears end inside words
    save_quantized(child, tmp_path / "child", source=folder, config=config)
    with torch.no_grad():
        stored = load_model(tmp_path / "child", dtype="float32")(tokens)
    assert torch.allclose(stored, trained_logits, rtol=1e-4, atol=1e-4)
