"""A run small enough to be repeated many times, with everything in it that could differ after a resume."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import torch

from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig, attach_lora
from burnish.train.results import TrainResult
from burnish.train.trainer import train

VOCAB = 61
# 14 rows at 4 per step: an epoch ends in a short step, and a run of 11 steps sees nearly three.
SETTINGS: dict[str, Any] = {
    "steps": 11, "micro_batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2, "warmup": 3,
    "schedule": "cosine", "precision": "float32", "ordering": "grouped", "seed": 5, "weight_decay": 0.01,
}  # fmt: skip
_TRAINED: dict[int, str] = {}


@dataclass(frozen=True)
class Row:
    tokens: list[int]
    labels: list[int]


def tiny_rows(count: int = 14, *, seed: int = 0) -> list[Row]:
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        tokens = [source.randrange(VOCAB) for _ in range(source.randint(4, 11))]
        rows.append(Row(tokens, [-100, -100, *tokens[2:]]))
    return rows


def tiny_decoder(*, seed: int = 0) -> Decoder:
    config = ModelConfig(
        family="llama", vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=8, rotary_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    return Decoder(config).initialize(std=0.3, seed=seed).eval()


def tiny_train(*, dropout: float = 0.1, **options: Any) -> TrainResult:
    """Train a fresh tiny decoder; options are `train`'s and `TrainConfig`'s."""
    arguments = {name: options.pop(name) for name in list(options) if name in ARGUMENTS}
    config = TrainConfig(**{**SETTINGS, **options})
    model = tiny_decoder()
    if config.method == "lora":
        attach_lora(model, LoraConfig(rank=4, dropout=dropout), seed=config.seed)
    result = train(model, tiny_rows(), config=config, **arguments)
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update((value + 0.0).contiguous().view(torch.uint8).numpy().tobytes())
    _TRAINED[id(result)] = digest.hexdigest()
    return result


ARGUMENTS = ("eval_examples", "on_step", "on_eval", "meter", "checkpoints", "resume", "stop")


def fingerprint(result: TrainResult) -> dict[str, Any]:
    """Every bit of what a run came to, without its times."""
    return {
        "losses": [step.loss.hex() for step in result.steps],
        "norms": [step.grad_norm.hex() for step in result.steps],
        "rates": [step.learning_rate.hex() for step in result.steps],
        "tokens": [step.tokens for step in result.steps],
        "evaluations": [[item.step, None if item.loss is None else item.loss.hex()] for item in result.eval],
        "best_step": result.best_step,
        "stopped": result.stopped,
        "weights": _TRAINED[id(result)],
    }
