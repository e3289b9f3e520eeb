"""What scaling, rotating and mixed widths are worth on a small real model and text that calibration has not seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from burnish.compress.config import MixedPrecision, QuantizeConfig
from burnish.compress.quantize import quantize_model
from burnish.compress.rotation import rotate_model
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder

Divergence = Callable[..., float]


@pytest.fixture(scope="module")
def divergence(shared_data: Path) -> Divergence:
    """Mean KL of a child from stories260k on held-out text; the child is made by the config that it is called with."""
    folder = shared_data / "models" / "stories260k"
    text = (shared_data / "text" / "tinystories_sample_197k.txt").read_text(encoding="utf-8", errors="replace")
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    rows = [[1, *tokens[start : start + 255]] for start in range(0, len(tokens) - 255, 255)]
    held_out = torch.tensor(rows[len(rows) // 2 :])[:48]

    @torch.no_grad()
    def predictions(decoder: Decoder) -> torch.Tensor:
        return decoder(held_out)[:, :-1].log_softmax(-1)

    expected = predictions(load_decoder(folder, dtype="float32"))

    def measure(config: QuantizeConfig | None, *, mixed: MixedPrecision | None = None) -> float:
        child = load_decoder(folder, dtype="float32")
        if config is None:
            rotate_model(child)
        else:
            quantize_model(child, rows[:24], config, mixed=mixed)
        return float((expected.exp() * (expected - predictions(child))).sum(-1).mean())

    return measure


@pytest.fixture(scope="module")
def rounded(divergence: Divergence) -> float:
    """Plain rounding to 4 bits, one scale per output feature."""
    return divergence(QuantizeConfig(method="rtn", bits=4, group_size=-1))


@pytest.mark.parametrize("method", ["awq", "awq-gptq"])
def test_scaling_beats_rounding_at_four_bits(divergence: Divergence, rounded: float, method: str) -> None:
    assert divergence(QuantizeConfig(method=method, bits=4, group_size=-1)) < rounded


def test_scaling_beats_rounding_at_three_bits(divergence: Divergence) -> None:
    plain = divergence(QuantizeConfig(method="rtn", bits=3, group_size=-1))
    assert divergence(QuantizeConfig(method="awq", bits=3, group_size=-1)) < plain


def test_rotation_loses_nothing_before_rounding(divergence: Divergence) -> None:
    assert abs(divergence(None)) < 1e-6


def test_rotated_and_corrected_beats_rounding_at_four_bits(divergence: Divergence, rounded: float) -> None:
    assert divergence(QuantizeConfig(method="gptq", bits=4, group_size=-1, rotate=True)) < rounded


def test_mixed_widths_beat_one_width_of_as_many_bits(divergence: Divergence) -> None:
    config = QuantizeConfig(method="gptq", bits=3, group_size=-1)
    # 3 bits, scales and zero points: 3.69 stored bits per weight.
    assert divergence(config, mixed=MixedPrecision(target_bits=3.69)) < divergence(config)


def test_more_bits_lose_less(divergence: Divergence, rounded: float) -> None:
    config = QuantizeConfig(method="rtn", group_size=-1)
    assert divergence(config, mixed=MixedPrecision(target_bits=5.5)) < 0.8 * rounded
