"""Blocks that do not fuse attend on the compiled kernels: the same step as with padded rows, for less memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from burnish.kernels.cpu.training import available
from burnish.train.compiled_attention import CompiledCausal
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig, attach_lora, lora_parameters
from burnish.train.packed_attention import PackedCausal
from burnish.train.step import StepRunner

pytestmark = pytest.mark.skipif(not available("cpu", torch.float32), reason="no compiled kernels here")
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "alibi": {"position": "alibi", "rotary_dim": 0},
    "window": {"sliding_window": 5},
    "head norms": {"qk_norm": True},
    "output norms": {"output_norms": True},
}
DORA = LoraConfig(rank=4, use_dora=True)


@dataclass(frozen=True)
class Row:
    tokens: list[int]

    @property
    def labels(self) -> list[int]:
        return self.tokens


def runner_of(model: nn.Module, *, precision: str = "float32", **settings: Any) -> StepRunner:
    """For one adapter with DoRA, B away from zero."""
    attach_lora(model, DORA, seed=0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    config = TrainConfig(micro_batch_size=8, precision=precision, **settings)  # type: ignore[arg-type]
    return StepRunner(model.train(), lora_parameters(model), config, precision)


@pytest.mark.parametrize("shape", SHAPES)
def test_step_is_that_of_padded_rows(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any], shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("torch's own way was taken")

    monkeypatch.setattr(PackedCausal, "attend", refused)
    losses, gradients = [], []
    for packing in (True, False):
        runner = runner_of(make_decoder(**SHAPES[shape]), packing=packing)
        with runner.prepared():
            assert runner._fused.num_blocks == 0
            losses.append(runner.accumulate(make_rows(7)).loss)
        gradients.append([parameter.grad for parameter in runner.parameters])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    largest = max(float(grad.abs().max()) for grad in gradients[1])
    for one, other in zip(*gradients, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * largest


def test_bounded_scores_go_the_other_way(make_decoder: Callable[..., Any], make_rows: Callable[..., Any]) -> None:
    losses = []
    for packing in (True, False):
        runner = runner_of(make_decoder(attention_softcap=5.0), packing=packing)
        with runner.prepared():
            losses.append(runner.accumulate(make_rows(5)).loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_is_kept_does_not_grow_with_the_square_of_a_row(make_decoder: Callable[..., Any], precision: str) -> None:
    kept = []
    for rows in ([Row([1] * 121)], [Row([1] * 31)] * 4):  # as many positions, once in one row
        model = make_decoder().to(getattr(torch, precision))
        runner = runner_of(model, precision=precision)
        with runner.prepared():
            runner.accumulate(rows)
        kept.append(runner.activation_bytes)
    assert kept[0] == pytest.approx(kept[1], rel=0.01)


def test_inputs_of_several_dtypes_go_the_other_way(monkeypatch: pytest.MonkeyPatch, make_decoder: Any) -> None:
    from burnish.kernels.cpu.training import TrainingKernels
    from burnish.models.attention import spec_of_layer

    seen = []
    monkeypatch.setattr(PackedCausal, "attend", lambda *inputs: seen.append(inputs[2].dtype))
    spec = spec_of_layer(make_decoder().config, 0)
    q_BHTE = torch.zeros(1, spec.num_heads, 4, spec.head_dim)
    k_BKTE = torch.zeros(1, spec.num_kv_heads, 4, spec.head_dim)
    rows = CompiledCausal([0, 4], kernels=TrainingKernels())
    rows.attend(0, q_BHTE.bfloat16(), k_BKTE, k_BKTE, spec)
    assert seen == [torch.bfloat16]
