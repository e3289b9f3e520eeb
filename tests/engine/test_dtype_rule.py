"""The rule for "auto", row by row."""

from __future__ import annotations

import pytest
import torch

from burnish.engine import dtype_rule
from burnish.engine.dtype_rule import pick_dtype
from burnish.errors import ConfigError

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("parameters", "stored", "units", "expected"),
    [
        (10_000_000, F32, True, F32),
        (10_000_000, BF16, True, F32),
        (200_000_000, F32, True, BF16),
        (200_000_000, BF16, True, BF16),
        (200_000_000, BF16, False, F32),
        (2_000_000_000, BF16, False, BF16),
        (2_000_000_000, F16, False, BF16),
        (2_000_000_000, F32, False, F32),
        (2_000_000_000, None, True, BF16),
    ],
)
def test_auto_follows_hardware_checkpoint_and_size(
    monkeypatch: pytest.MonkeyPatch,
    parameters: int,
    stored: torch.dtype | None,
    units: bool,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(dtype_rule, "cpu_multiplies_bfloat16", lambda: units)
    assert pick_dtype("auto", num_parameters=parameters, stored=stored, device=CPU) == expected


def test_asked_dtype_wins() -> None:
    assert pick_dtype("bfloat16", num_parameters=1, stored=F32, device=CPU) == BF16
    assert pick_dtype(F16, num_parameters=1, stored=F32, device=CPU) == F16


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="dtype"):
        pick_dtype("int3", num_parameters=1, stored=F32, device=CPU)
