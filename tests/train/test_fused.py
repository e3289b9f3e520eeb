"""Fused blocks against the decoder's own forward under autograd, and packed rows against padded ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from burnish.kernels.cpu.training import available
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig, attach_lora, lora_parameters
from burnish.train.packing import pack, split_step
from burnish.train.step import StepRunner
from burnish.train.trainer import train

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "layernorm, plain gelu": {"norm": "layernorm", "mlp": "plain", "activation": "gelu"},
    "parallel": {"parallel_residual": True},
    "parallel, one norm": {"parallel_residual": True, "shared_norm": True, "norm": "layernorm"},
    "alibi": {"position": "alibi", "rotary_dim": 0},
    "learned positions": {"position": "learned", "rotary_dim": 0},
    "window": {"sliding_window": 5},
    "norm offset": {"norm_weight_offset": 1.0, "embedding_scale": 2.0},
    "interleaved": {"rotary_interleaved": True},
    "not fused: head norms": {"qk_norm": True},
    "not fused: bounded scores": {"attention_softcap": 5.0, "logit_softcap": 3.0},
    "not fused: output norms": {"output_norms": True},
}
needs_kernels = pytest.mark.skipif(not available("cpu", torch.float32), reason="no compiled kernels here")


def gradients(model: nn.Module, rows: list[Any], **settings: Any) -> tuple[float, list[torch.Tensor], int]:
    """One step's loss, gradients of everything trained, and how many blocks ran fused."""
    config = TrainConfig(**{"precision": "float32", "micro_batch_size": 8, **settings})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    model.gradient_checkpointing = config.gradient_checkpointing  # type: ignore[assignment]
    model.checkpoint_every = config.checkpoint_every  # type: ignore[assignment]
    runner = StepRunner(model, parameters, config, config.precision)
    with runner.prepared():
        blocks = runner._fused.num_blocks
        loss = runner.accumulate(rows).loss
    return loss, [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters], blocks


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor], *, tolerance: float = 1e-5) -> None:
    """Differences are below `tolerance` of the largest gradient of all."""
    largest = max(float(grad.abs().max()) for grad in want)
    for one, other in zip(got, want):
        assert float((one.float() - other.float()).abs().max()) <= tolerance * largest


def perturbed(model: nn.Module) -> nn.Module:
    """B away from zero, so that A has gradients too."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_packed_step_equals_the_padded_one(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any], shape: str, method: Any
) -> None:
    results = []
    for packing in (True, False):
        model = make_decoder(**SHAPES[shape])
        if method == "lora":
            attach_lora(model, LoraConfig(rank=4), seed=0)
            perturbed(model)
        results.append(gradients(model, make_rows(7), method=method, packing=packing))
    (loss, grads, fused), (expected, wanted, unfused) = results
    assert loss == pytest.approx(expected, abs=1e-5)
    assert_same(grads, wanted)
    assert unfused == 0
    if available("cpu", torch.float32):
        assert (fused == 0) == shape.startswith("not fused")


@needs_kernels
@pytest.mark.parametrize("settings", [
    {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"micro_batch_tokens": 20},
    {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "checkpoint_every": 2},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("method", ["lora", "full"])
def test_cut_and_checkpointed_steps_equal_the_whole_one(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any], settings: dict[str, Any], method: Any
) -> None:
    results = []
    for extra in ({}, settings):
        model = make_decoder(num_layers=3)
        if method == "lora":
            attach_lora(model, LoraConfig(rank=4), seed=0)
            perturbed(model)
        results.append(gradients(model, make_rows(7), method=method, **extra))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-6)
    assert_same(results[1][1], results[0][1])


def test_rotations_that_follow_the_length_follow_that_of_each_row(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any]
) -> None:
    results = []
    for size in (1, 8):
        model = make_decoder(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=9)
        results.append(gradients(model, make_rows(7), method="full", micro_batch_size=size))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert_same(results[0][1], results[1][1])


@needs_kernels
@pytest.mark.parametrize("targets", [("q_proj",), ("v_proj", "down_proj"), ("gate_proj", "o_proj", "k_proj")])
def test_adapters_on_some_linears_only(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any], targets: tuple[str, ...]
) -> None:
    results = []
    for packing in (True, False):
        model = make_decoder(qkv_bias=True)
        attach_lora(model, LoraConfig(rank=3, target_modules=targets), seed=0)
        results.append(gradients(perturbed(model), make_rows(5), packing=packing))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert_same(results[0][1], results[1][1])
    assert results[0][2] > 0


@needs_kernels
def test_adapter_on_the_output_layer(make_decoder: Callable[..., Any], make_rows: Callable[..., Any]) -> None:
    results = []
    for packing in (True, False):
        model = make_decoder(tie_word_embeddings=False)
        attach_lora(model, LoraConfig(rank=3, target_modules=("lm_head", "q_proj")), seed=0)
        results.append(gradients(perturbed(model), make_rows(5), packing=packing))
    assert_same(results[0][1], results[1][1])


@needs_kernels
def test_frozen_weights_are_untouched_by_the_run(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any]
) -> None:
    model = make_decoder().bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attach_lora(model, LoraConfig(rank=4), seed=0)
    train(model, make_rows(8), config=TrainConfig(steps=2))
    after = {name.replace(".base.", "."): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "forward" not in vars(model.model.layers[0])


def test_rows_end_to_end(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(3, shortest=4, longest=9)
    batch = pack(rows, device="cpu")
    ends = [sum(len(row.tokens) - 1 for row in rows[:count]) for count in range(4)]
    assert batch.starts[:4] == tuple(ends)
    assert batch.starts[-1] == batch.num_slots == 32
    assert batch.num_positions == ends[3]
    for row, begin, end in zip(rows, ends, ends[1:]):
        assert batch.tokens_N[begin:end].tolist() == row.tokens[:-1]
        assert batch.labels_N[begin:end].tolist() == row.labels[1:]
        assert batch.positions_N[begin:end].tolist() == list(range(end - begin))
    assert set(batch.labels_N[ends[3] :].tolist()) <= {-100}
    assert batch.num_labels == int((batch.labels_N != -100).sum())
    assert batch.lengths_N[: ends[1]].tolist() == [ends[1]] * ends[1]


def test_micro_batches_hold_every_row_once_within_the_limits(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(20, shortest=3, longest=30)
    parts = split_step(rows, max_rows=4, max_tokens=40)
    assert sorted(id(row) for part in parts for row in part) == sorted(map(id, rows))
    for part in parts:
        assert len(part) <= 4
        assert len(part) == 1 or sum(len(row.tokens) - 1 for row in part) <= 40
