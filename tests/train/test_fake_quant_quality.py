"""What quantization-aware training wins on a real model, on text that it was neither calibrated nor trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import quantized_linears
from burnish.compress.quantize import quantize_model
from burnish.measure.compare import compare_models
from burnish.models.loading import load_decoder
from burnish.train.config import TrainConfig
from burnish.train.fake_quant import attach_fake_quant, parent_computes
from burnish.train.lora import LoraConfig
from burnish.train.trainer import train

pytestmark = pytest.mark.slow


class _Row:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = self.labels = tokens


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> list[list[int]]:
    text = (shared_data / "text" / "tinystories_sample_197k.txt").read_text(encoding="utf-8", errors="replace")
    tokenizer = Tokenizer.from_file(str(shared_data / "models" / "stories260k" / "tokenizer.json"))
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    return [[1, *tokens[start : start + 255]] for start in range(0, len(tokens) - 254, 255)]


@pytest.mark.parametrize(("bits", "most"), [(3, 0.25), (2, 1.0)])
def test_hybrid_beats_gptq_on_text_it_has_not_seen(
    shared_data: Path, rows: list[list[int]], bits: int, most: float
) -> None:
    folder = shared_data / "models" / "stories260k"
    parent, child, trained = (load_decoder(folder, dtype="float32") for _ in range(3))
    learned, held_out = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    quantize_model(child, learned[:64], QuantizeConfig(bits=bits, group_size=-1, symmetric=False))
    start = {name: layer.quantized() for name, layer in quantized_linears(child).items()}
    attach_fake_quant(trained, start, LoraConfig(rank=32, alpha=64), seed=0)
    config = TrainConfig(steps=60, micro_batch_size=16, learning_rate=1e-2, warmup=0.05, precision="float32")
    train(trained, [_Row(row) for row in learned], config=config, parent=lambda: parent_computes(trained))
    with torch.no_grad():
        plain, hybrid = (compare_models(each, parent, held_out) for each in (child, trained))
    print(f"{bits} bits: GPTQ {plain.perplexity_child:.3f}, KL {plain.kl_mean:.4f}; ", end="")
    print(f"hybrid {hybrid.perplexity_child:.3f}, KL {hybrid.kl_mean:.4f}")
    assert hybrid.kl_mean < 0.6 * plain.kl_mean
    assert hybrid.kl_mean < most
    assert hybrid.perplexity_child < plain.perplexity_child
