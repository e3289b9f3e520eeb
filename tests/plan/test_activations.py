"""Predicted activations against what autograd really keeps in small decoders."""

from __future__ import annotations

import pytest
import torch

from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.plan import activations
from burnish.train.footprint import saved_activations
from burnish.train.lora import LoraConfig, attach_lora, lora_parameters

ROWS, SEQUENCE, RANK = 4, 64, 8

GPT = {
    "norm": "layernorm",
    "position": "learned",
    "rotary_dim": 0,
    "mlp": "plain",
    "activation": "gelu_tanh",
    "qkv_bias": True,
    "o_bias": True,
    "mlp_bias": True,
    "num_kv_heads": 4,
}
KINDS = {
    "llama": {},
    "gpt": GPT,
    "bloom": {**GPT, "position": "alibi", "embedding_norm": True},
    "falcon": {"norm": "layernorm", "mlp": "plain", "num_kv_heads": 1, "parallel_residual": True, "shared_norm": True},
    "qwen3": {"qk_norm": True},
    "window": {"sliding_window": 16},
    "gemma": {"output_norms": True, "norm_weight_offset": 1.0, "attention_softcap": 50.0},
}


def make_config(kind: str) -> ModelConfig:
    record: dict[str, object] = {
        "family": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_layers": 6,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rotary_dim": 16,
    }
    return ModelConfig.from_dict({**record, **KINDS[kind]})


def measured_bytes(config: ModelConfig, *, dtype: torch.dtype, full: bool) -> int:
    model = Decoder(config, dtype=dtype).initialize().train()
    if not full:
        model.requires_grad_(False)
        attach_lora(model, LoraConfig(rank=RANK), seed=0)
        for parameter in lora_parameters(model):
            parameter.requires_grad_(True)
    with saved_activations(model) as saved:
        model.hidden(torch.zeros(ROWS, SEQUENCE, dtype=torch.int64))
    return saved.num_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "full"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_saved_bytes_are_within_a_tenth_of_the_decoders(kind: str, dtype: torch.dtype, full: bool) -> None:
    config = make_config(kind)
    predicted = activations.saved_activations(
        config,
        rows=ROWS,
        sequence=SEQUENCE,
        dtype_bytes=dtype.itemsize,
        adapter_rank=0 if full else RANK,
        full=full,
        checkpointing=False,
    )
    assert predicted == pytest.approx(measured_bytes(config, dtype=dtype, full=full), rel=0.1)


def test_checkpointing_keeps_block_inputs_and_one_block() -> None:
    config = make_config("llama")
    settings = {"rows": 4, "sequence": 64, "dtype_bytes": 4, "adapter_rank": 8, "full": False}
    kept = activations.saved_activations(config, **settings, checkpointing=True)
    everything = activations.saved_activations(config, **settings, checkpointing=False)
    inputs = 6 * 4 * 64 * 64 * 4
    assert inputs < kept < inputs + everything / 4


def test_loss_workspace_is_bounded_by_the_chunk() -> None:
    config = make_config("llama")
    few = activations.loss_workspace(config, tokens=10, dtype_bytes=4)
    assert few == 10 * 64 * 8
    many = activations.loss_workspace(config, tokens=10**9, dtype_bytes=4)
    assert many == 2 * activations.LOGITS_CHUNK_BYTES
