"""What quantizing costs a real model on text that it was not calibrated on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from burnish.compress.config import QuantizeConfig
from burnish.compress.quantize import quantize_model
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder

pytestmark = pytest.mark.slow

CALIBRATION_ROWS = 64


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> torch.Tensor:
    text = (shared_data / "text" / "tinystories_sample_197k.txt").read_text(encoding="utf-8", errors="replace")
    tokenizer = Tokenizer.from_file(str(shared_data / "models" / "stories260k" / "tokenizer.json"))
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    return torch.tensor([[1, *tokens[start : start + 255]] for start in range(0, len(tokens) - 254, 255)])


@torch.no_grad()
def _perplexity_and_divergence(child: Decoder, parent: Decoder, rows: torch.Tensor) -> tuple[float, float]:
    loss = divergence = count = 0
    for tokens_BT in rows.split(32):
        ours, theirs = (model(tokens_BT)[:, :-1].log_softmax(-1) for model in (child, parent))
        loss -= float(ours.gather(-1, tokens_BT[:, 1:, None]).sum())
        divergence += float((theirs.exp() * (theirs - ours)).sum())
        count += tokens_BT[:, 1:].numel()
    return math.exp(loss / count), divergence / count


@pytest.mark.parametrize(
    ("options", "most", "most_divergence"),
    [
        ({"bits": 8}, 7.182 + 0.02, 0.0005),
        ({"bits": 4, "scale_search": False}, 8.05, 0.145),
        ({"bits": 4}, 7.9, 0.12),
        ({"bits": 4, "match_parent": True, "refine": 3}, 7.70, 0.08),
        ({"bits": 4, "match_parent": True, "refine": 3, "symmetric": False}, 7.65, 0.068),
        ({"bits": 3, "match_parent": True, "refine": 3, "symmetric": False}, 9.9, 0.35),
        ({"bits": 2, "match_parent": True, "refine": 3, "symmetric": False}, 33.0, 1.65),
    ],
    ids=["8", "4-whole-range", "4", "4-matched", "4-best", "3-best", "2-best"],
)
def test_perplexity_per_channel_stays_below(
    shared_data: Path, rows: torch.Tensor, options: dict[str, object], most: float, most_divergence: float
) -> None:
    folder = shared_data / "models" / "stories260k"
    parent, child = (load_decoder(folder, dtype="float32") for _ in range(2))
    config = QuantizeConfig(group_size=-1, **options)  # pyright: ignore[reportArgumentType]
    quantize_model(child, rows[:CALIBRATION_ROWS].tolist(), config)
    perplexity, divergence = _perplexity_and_divergence(child, parent, rows[len(rows) // 2 :])
    assert perplexity <= most
    assert divergence <= most_divergence


def test_matching_the_parent_does_no_harm_with_few_tokens(shared_data: Path, rows: torch.Tensor) -> None:
    folder = shared_data / "models" / "stories260k"
    parent, found = load_decoder(folder, dtype="float32"), {}
    for match in (False, True):
        child = load_decoder(folder, dtype="float32")
        quantize_model(child, rows[:2].tolist(), QuantizeConfig(bits=4, group_size=-1, match_parent=match))
        found[match] = _perplexity_and_divergence(child, parent, rows[len(rows) // 2 :])[1]
    assert found[True] < found[False]
