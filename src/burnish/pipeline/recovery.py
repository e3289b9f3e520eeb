"""Recovery: what a pruned model lost, learned again by adapters that are merged into it and leave its zeros alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from burnish.errors import ConfigError
from burnish.models.decoder import Decoder
from burnish.pipeline.progress import Progress, silent
from burnish.pipeline.training_data import Row
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig, attach_lora, merge_adapter
from burnish.train.masked_lora import attach_masked_lora
from burnish.train.results import StepRecord
from burnish.train.trainer import train


@dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """Settings of the recovery.

    Attributes:
        steps: optimizer steps.
        rank: of the adapters on every linear of the blocks; their alpha is twice that.
        learning_rate: peak rate, warmed up over 5 % of the steps and brought to 0 along a cosine.
        batch_size: rows per step.
        seed: of the adapters and the order of rows.
    """

    steps: int
    rank: int = 32
    learning_rate: float = 1e-3
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("recover", self.steps), ("rank", self.rank), ("batch_size", self.batch_size)):
            if value < 1:
                raise ConfigError(f"{name} is out of range", got=value, expected="1 or more")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(
                "learning_rate is out of range", got=self.learning_rate, expected="more than 0, and finite"
            )

    @property
    def num_rows(self) -> int:
        """Rows that are seen once each."""
        return self.steps * self.batch_size


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a recovery did; losses in nats per learned token, of the first step and of the last tenth of them."""

    steps: int
    num_rows: int
    seconds: float
    tokens_per_s: float
    loss_before: float
    loss_after: float


def recover(
    decoder: Decoder, examples: Sequence[Row], config: RecoverConfig, *, masked: bool, progress: Progress = silent
) -> Recovery:
    """Train adapters on a pruned decoder and merge them, in place.

    Args:
        examples: training rows; fewer than the steps ask for are seen again.
        masked: weights that are zero stay zero, in training and in the merge.

    Raises:
        ConfigError, DataError: the model or the rows cannot be trained.
        KeyboardInterrupt: it was stopped; the decoder carries adapters then.
    """
    lora = LoraConfig(rank=config.rank, alpha=2 * config.rank)
    (attach_masked_lora if masked else attach_lora)(decoder, lora, seed=config.seed)

    def on_step(step: StepRecord) -> None:
        progress("Recovering", step.step, config.steps, f"loss {step.loss:.3f}")

    result = train(
        decoder,
        examples,
        config=TrainConfig(
            steps=config.steps,
            micro_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            warmup=0.05,
            seed=config.seed,
        ),
        on_step=on_step,
    )
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    merge_adapter(decoder)
    decoder.requires_grad_(True).eval()
    tail = [step.loss for step in result.steps[-max(1, len(result.steps) // 10) :]]
    return Recovery(
        steps=len(result.steps),
        num_rows=len(examples),
        seconds=result.seconds,
        tokens_per_s=result.tokens_per_s,
        loss_before=result.steps[0].loss,
        loss_after=sum(tail) / len(tail),
    )
