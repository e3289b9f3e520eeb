"""Predicted parts of fine-tuning against the tensors of a real step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from burnish.kernels.cpu.training import available
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.plan.devices import Device
from burnish.plan.options import PlanOptions
from burnish.plan.training import filled, fuses, predict_training, widths
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig, attach_lora
from burnish.train.packing import pack
from burnish.train.step import StepRunner

RANK, TOKENS = 8, 129
GPT = {
    "norm": "layernorm", "position": "learned", "rotary_dim": 0, "mlp": "plain", "activation": "gelu_tanh",
    "qkv_bias": True, "o_bias": True, "mlp_bias": True, "num_kv_heads": 4,
}  # fmt: skip
FUSED = {
    "llama": {},
    "gpt": GPT,
    "falcon": {"norm": "layernorm", "mlp": "plain", "num_kv_heads": 1, "parallel_residual": True, "shared_norm": True},
}
OWN_FORWARD = {"qwen3": {"qk_norm": True}, "gemma": {"output_norms": True, "attention_softcap": 50.0}}


@dataclass(frozen=True)
class Row:
    tokens: list[int]
    labels: list[int]


def make_config(kind: str) -> ModelConfig:
    record: dict[str, Any] = {
        "family": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 176, "num_layers": 6,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "rotary_dim": 16,
    }  # fmt: skip
    return ModelConfig.from_dict({**record, **(FUSED | OWN_FORWARD)[kind]})


def machine(kind: str = "cpu") -> Device:
    return Device(
        name=kind, title="a machine", kind=kind, memory_bytes=2**34, bandwidth=None, fp32=None, fp16=None, bf16=None,
        int8=None, bfloat16=False, source="made for the test",
    )  # fmt: skip


def predicted(config: ModelConfig, *, precision: str, method: str, **options: Any) -> dict[str, int]:
    work = PlanOptions(
        sequence_tokens=TOKENS, micro_batch_size=1, precision=precision, rank=RANK, dtype=precision, **options
    )
    return predict_training(config, machine(), work, precision if method != "full" else "float32", method=method)


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize(
    ("precision", "method", "every"),
    [("float32", "lora", 0), ("bfloat16", "lora", 0), ("float32", "full", 0), ("float32", "lora", 2)],
)
def test_kept_bytes_of_fused_blocks_are_within_a_tenth(kind: str, precision: Any, method: Any, every: int) -> None:
    config, dtype = make_config(kind), getattr(torch, precision)
    if not available("cpu", dtype):
        pytest.skip("the kernels are not compiled here")
    model = Decoder(config, dtype=dtype).initialize().train()
    if method == "lora":
        attach_lora(model, LoraConfig(rank=RANK), seed=0)
    model.gradient_checkpointing, model.checkpoint_every = every > 0, max(1, every)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    runner = StepRunner(model, trained, TrainConfig(method=method), precision)
    row = Row([token % 64 for token in range(TOKENS)], [-100] * (TOKENS - 1) + [1])
    with runner.prepared():
        runner.accumulate([row])
    kept = runner.activation_bytes
    if method == "full":
        kept -= config.vocab_size * config.hidden_size * 4  # the output layer's gradient waits there too
    parts = predicted(
        config, precision=precision, method=method, gradient_checkpointing=every > 0, checkpoint_every=max(1, every)
    )
    assert parts["activations"] == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("kind", ["llama", "gpt"])
@pytest.mark.parametrize(("dora", "dropout"), [(True, 0.0), (False, 0.1), (True, 0.1)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_kept_bytes_with_dora_or_dropout_are_within_a_tenth(
    kind: str, precision: Any, dora: bool, dropout: float
) -> None:
    config, dtype = make_config(kind), getattr(torch, precision)
    if not available("cpu", dtype):
        pytest.skip("the kernels are not compiled here")
    model = Decoder(config, dtype=dtype).initialize().train()
    attach_lora(model, LoraConfig(rank=RANK, use_dora=dora, dropout=dropout), seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    runner = StepRunner(model, trained, TrainConfig(), precision)
    with runner.prepared():
        runner.accumulate([Row([token % 64 for token in range(TOKENS)], [-100] * (TOKENS - 1) + [1])])
    parts = predicted(config, precision=precision, method="lora", dora=dora, dropout=dropout > 0)
    assert parts["activations"] == pytest.approx(runner.activation_bytes, rel=0.1)
    assert parts["gradients"] == 4 * sum(parameter.numel() for parameter in trained)


@pytest.mark.parametrize("kind", FUSED)
def test_joined_adapters_are_those_of_the_groups(kind: str) -> None:
    if not available("cpu", torch.float32):
        pytest.skip("the kernels are not compiled here")
    config = make_config(kind)
    model = Decoder(config).initialize()
    attach_lora(model, LoraConfig(rank=RANK, target_modules=("q_proj", "down_proj")), seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    runner = StepRunner(model, trained, TrainConfig(), "float32")
    with runner.prepared():
        groups = runner._fused.groups
        held = sum(4 * (group._a_RI.numel() + group._b_OR.numel()) for group in groups)
    parts = predicted(config, precision="float32", method="lora", target_modules=("q_proj", "down_proj"))
    assert parts["joined adapters"] == held


@pytest.mark.parametrize("kind", [*FUSED, *OWN_FORWARD])
def test_blocks_fuse_where_the_trainer_fuses_them(kind: str) -> None:
    config = make_config(kind)
    model = Decoder(config).initialize()
    attach_lora(model, LoraConfig(rank=RANK), seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    runner = StepRunner(model, trained, TrainConfig(), "float32")
    with runner.prepared():
        assert fuses(config, machine(), PlanOptions()) == (runner._fused.num_blocks > 0 or kind in FUSED)
    assert not fuses(config, machine("cuda"), PlanOptions())
    assert not fuses(config, machine(), PlanOptions(packing=False))
    assert not fuses(config, machine(), PlanOptions(dora=True))
    assert not fuses(config, machine(), PlanOptions(dropout=True))


@pytest.mark.parametrize("tokens", [2, 31, 33, 34, 100, 128, 129, 130, 300])
def test_positions_are_filled_up_as_micro_batches_are(tokens: int) -> None:
    row = Row([1] * tokens, [1] * tokens)
    assert pack([row], device="cpu").num_slots == filled(tokens - 1)


def test_micro_batches_follow_the_options_until_they_are_counted() -> None:
    long = widths(PlanOptions(sequence_tokens=1025), machine())
    assert long.positions == 1024  # a row longer than what is taken at once goes alone
    few = widths(PlanOptions(sequence_tokens=65, micro_batch_size=2), machine())
    assert few.positions == 128
    padded = widths(PlanOptions(sequence_tokens=66, micro_batch_size=2, packing=False), machine())
    assert padded.positions == 160
    counted = widths(PlanOptions(positions=96, labels=5, widths=2), machine())
    assert (counted.positions, counted.labels, counted.kinds) == (96, 5, 2)


@pytest.mark.parametrize(
    ("optimizer", "per_number"), [("adamw", 8), ("lion", 8), ("adamw-8bit", 2), ("adafactor", None)]
)
def test_state_of_each_optimizer(optimizer: str, per_number: int | None) -> None:
    config = make_config("llama")
    size = predicted(config, precision="float32", method="full", optimizer=optimizer)["optimizer"]
    if per_number is None:
        assert size < config.num_parameters()
    else:
        assert size == per_number * config.num_parameters()


def test_every_nth_block_keeps_between_all_and_none() -> None:
    config = make_config("llama")
    kept = [
        predicted(config, precision="float32", method="lora", gradient_checkpointing=on, checkpoint_every=every)
        for on, every in ((False, 1), (True, 3), (True, 2), (True, 1))
    ]
    sizes = [parts["activations"] for parts in kept]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[3] < 0.3 * sizes[0]
