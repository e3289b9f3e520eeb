"""Settings of a run that make no sense."""

from __future__ import annotations

import math
from typing import Any

import pytest

from burnish.errors import ConfigError
from burnish.train.config import TrainConfig

POSITIVE = ("learning_rate", "max_grad_norm", "max_seconds", "epochs", "epsilon")
AT_LEAST_ZERO = ("warmup", "weight_decay", "neftune", "early_stopping_min_delta")


@pytest.mark.parametrize("name", [*POSITIVE, *AT_LEAST_ZERO, "min_rate"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_number_without_a_meaning_is_refused(name: str, value: float) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"{name} is out of range"):
        TrainConfig(**settings)


@pytest.mark.parametrize("name", POSITIVE)
def test_zero_is_refused_where_nothing_would_happen(name: str) -> None:
    settings: dict[str, Any] = {name: 0.0}
    with pytest.raises(ConfigError, match=f"{name} is out of range"):
        TrainConfig(**settings)


def test_two_lengths_of_a_run_are_refused() -> None:
    with pytest.raises(ConfigError, match="both steps and epochs"):
        TrainConfig(steps=3, epochs=1.0)
