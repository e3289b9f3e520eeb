"""A card made smaller, and the dtype of cards without bfloat16; the card is made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from burnish.engine.dtype_rule import pick_dtype
from burnish.engine.memory_budget import limit_card
from burnish.errors import ConfigError
from burnish.plan.overheads import RUNTIME_CUDA

CARD = torch.device("cuda")


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.device]]:
    """Shares of a card of 80 GiB that were asked for."""
    asked: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *of: asked.append(of))
    return asked


def test_large_card_behaves_as_a_small_one(fractions: list[tuple[float, torch.device]]) -> None:
    limit_card(CARD, "16GiB")
    assert fractions == [(((16 << 30) - RUNTIME_CUDA) / (80 << 30), torch.device("cuda", 1))]


def test_card_is_left_alone_unless_asked(fractions: list[tuple[float, torch.device]]) -> None:
    limit_card(CARD, None)
    limit_card(torch.device("cpu"), "16GiB")
    assert fractions == []


@pytest.mark.parametrize(("memory", "message"), [("81GiB", "more than the GPU has"), ("much", "not a size")])
def test_size_that_cannot_be_had_is_refused(
    fractions: list[tuple[float, torch.device]], memory: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        limit_card(CARD, memory)
    assert fractions == []


@pytest.mark.parametrize(
    ("stored", "multiplies_bfloat16", "expected"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float16),
        (torch.float32, False, torch.float16),
        (torch.float16, True, torch.float16),
        (None, True, torch.bfloat16),
    ],
)
def test_cards_without_bfloat16_take_float16(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype | None, multiplies_bfloat16: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: multiplies_bfloat16)
    assert pick_dtype("auto", num_parameters=7_000_000_000, stored=stored, device=CARD) == expected
