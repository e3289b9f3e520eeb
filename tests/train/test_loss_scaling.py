"""The loss scale: how it moves, and that float16 training with it follows float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from burnish.errors import BurnishError
from burnish.train import run as run_module
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig, attach_lora
from burnish.train.loss_scaling import CEILING, LossScale
from burnish.train.results import TrainResult
from burnish.train.trainer import train


def test_scale_halves_on_overflow_and_doubles_when_it_holds() -> None:
    scale = LossScale(start=8.0, double_after=3)
    assert scale.update(overflow=True)
    assert scale.value == 4.0
    for _ in range(3):
        assert not scale.update(overflow=False)
    assert scale.value == 8.0
    for _ in range(2):
        scale.update(overflow=False)
    scale.update(overflow=True)
    for _ in range(2):
        scale.update(overflow=False)
    assert scale.value == 4.0, "an overflow starts the count anew"


def test_overflow_at_the_floor_is_not_excused() -> None:
    scale = LossScale(start=2.0, floor=1.0)
    assert scale.update(overflow=True)
    assert not scale.update(overflow=True)
    assert scale.value == 1.0


def test_scale_has_a_ceiling() -> None:
    scale = LossScale(start=CEILING, double_after=1)
    scale.update(overflow=False)
    assert scale.value == CEILING


def test_restored_scale_continues() -> None:
    one, other = LossScale(start=64.0, double_after=3), LossScale()
    one.update(overflow=True)
    one.update(overflow=False)
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
    assert set(map(type, one.state_dict().values())) <= {int, float}


def test_small_gradients_survive_float16_and_huge_ones_are_seen() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(16, 8), torch.randn(16, 4) * 1e-3

    def gradient(dtype: torch.dtype, scale: LossScale, factor: float = 1e-6) -> torch.Tensor:
        layer = nn.Linear(8, 4)
        nn.init.constant_(layer.weight, 0.01)
        nn.init.zeros_(layer.bias)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = layer(x)
        loss = (out.float() - target).square().sum() * factor
        (loss * scale.value).backward()
        assert layer.weight.grad is not None
        scale.unscale([layer.weight.grad])
        return layer.weight.grad

    exact = gradient(torch.float32, LossScale(start=1.0))
    scaled = gradient(torch.float16, LossScale())
    lost = gradient(torch.float16, LossScale(start=1.0))
    torch.testing.assert_close(scaled, exact, rtol=1e-2, atol=1e-10)
    assert (lost - exact).norm() > 2 * (scaled - exact).norm()
    assert not gradient(torch.float16, LossScale(), factor=1e6).isfinite().all()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_float16_run_follows_float32_and_gives_its_weights_back(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any], method: Any
) -> None:
    def run(precision: Any) -> list[float]:
        model = make_decoder()
        if method == "lora":
            attach_lora(model, LoraConfig(rank=4), seed=0)
        config = TrainConfig(method=method, precision=precision, steps=6, learning_rate=5e-3, warmup=0)
        result = train(model, make_rows(24), config=config)
        assert result.precision == precision
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        return [step.loss for step in result.steps]

    assert run("float16") == pytest.approx(run("float32"), rel=5e-3)


def test_overflow_skips_a_step_that_counts_as_bad_only_at_the_floor(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(start: float, floor: float, steps: int) -> TrainResult:
        monkeypatch.setattr(run_module, "LossScale", lambda: LossScale(start=start, floor=floor))
        model = make_decoder()
        attach_lora(model, LoraConfig(rank=4), seed=0)
        config = TrainConfig(precision="float16", steps=steps, max_bad_steps=2)
        return train(model, make_rows(8), config=config)

    result = run(2.0**40, 1.0, 40)
    skipped = [step.skipped for step in result.steps]
    assert skipped[:3] == [True] * 3
    assert not skipped[-1]
    assert [step.overflow for step in result.steps] == skipped
    with pytest.raises(BurnishError, match="2 steps in a row"):
        run(2.0**60, 2.0**60, 5)
