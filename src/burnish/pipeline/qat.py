"""Quantization-aware training of a child that has just been quantized, before it is written and judged.

What is trained is in `train/fake_quant.py`. Checkpoints lie beside the finished blocks of the quantization, so that an
interrupted run goes on with both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq_format import quantized_linears
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.loading import load_model
from burnish.compress.partial import PartialFolder
from burnish.compress.quantized_weight import QuantizedWeight
from burnish.compress.rotation import rotate_model
from burnish.errors import ConfigError, DataError
from burnish.measure.json_values import to_plain
from burnish.measure.run_record import LossPoint
from burnish.models.decoder import Decoder
from burnish.models.linears import set_module
from burnish.pipeline.opening import Opened, Source
from burnish.pipeline.progress import Progress, silent, tell_nobody
from burnish.pipeline.training_data import Row
from burnish.pipeline.training_record import eval_points, loss_points
from burnish.pipeline.unfinished_quantization import fingerprint
from burnish.train.checkpoints import Checkpoint, CheckpointFolder, first_difference
from burnish.train.config import TrainConfig
from burnish.train.fake_quant import attach_fake_quant, detach_fake_quant, parent_computes
from burnish.train.lora import LoraConfig
from burnish.train.results import StepRecord, recent_loss
from burnish.train.trainer import train

ALPHA_PER_RANK = 2
RATE, RATE_FROM_GPTQ = 3e-3, 3e-4
CHECKPOINTS = "training"
SAVE_EVERY = 50
EVALUATIONS = 5
MOST_HELD_BACK = 64
TRAINABLE = ("rtn", "gptq")
"""Methods whose integers are those of the parent's own weights, or of the rotated ones."""


@dataclass(frozen=True, kw_only=True)
class QatConfig:
    """Settings of quantization-aware training.

    Attributes:
        steps: optimizer steps.
        rank: of what is added to the weights' places on their grids; its alpha is `ALPHA_PER_RANK` times that.
        learning_rate: peak rate, warmed up over 5 % of the steps and brought to 0 along a cosine; None chooses by what
            the training starts from, see `started_from`.
        batch_size: rows per step.
        distill: learn the parent's distributions; else the rows' labels.
        seed: of what is added and of the order of rows.
    """

    steps: int
    rank: int = 32
    learning_rate: float | None = None
    batch_size: int = 16
    distill: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("qat", self.steps), ("rank", self.rank), ("batch_size", self.batch_size)):
            if value < 1:
                raise ConfigError(f"{name} is out of range", got=value, expected="1 or more")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ConfigError(
                "learning_rate is out of range", got=self.learning_rate, expected="more than 0, and finite"
            )

    def started_from(self, quantization: QuantizeConfig) -> QatConfig:
        """These settings with a rate: GPTQ's own optimum of 3 bits and more is left with a tenth of the usual one."""
        if self.learning_rate is not None:
            return self
        close = quantization.method == "gptq" and quantization.bits > 2
        return replace(self, learning_rate=RATE_FROM_GPTQ if close else RATE)

    @property
    def num_rows(self) -> int:
        """Rows that are seen once each, and those held back."""
        return self.steps * self.batch_size + MOST_HELD_BACK

    @property
    def lora(self) -> LoraConfig:
        """What is trained on each linear."""
        return LoraConfig(rank=self.rank, alpha=ALPHA_PER_RANK * self.rank)

    @property
    def training(self) -> TrainConfig:
        """Settings of the loop; the rate has to be known."""
        assert self.learning_rate is not None
        return TrainConfig(
            steps=self.steps,
            micro_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup=0.05,
            eval_every=max(1, self.steps // EVALUATIONS),
            eval_first=True,
            keep_best=True,
            save_every=SAVE_EVERY,
            keep_last=1,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class Qat:
    """What the training did.

    Losses are the KL from the parent, or the cross-entropy of the labels, in nats per learned token.

    Attributes:
        num_rows, num_held_back: rows that were trained on, and rows that were not.
        loss_before, loss_after: on the rows held back, of what the quantization gave and of what was kept.
        kept_step: the step after which it was lowest; 0 is what the quantization gave.
        changed: share of the integers that are others than the quantization had given.
        loss, held_back_loss: the curves.
        resumed_from: step that it went on from.
    """

    steps: int
    num_rows: int
    num_held_back: int
    seconds: float
    tokens_per_s: float
    loss_before: float
    loss_after: float
    kept_step: int
    changed: float
    loss: list[LossPoint]
    held_back_loss: list[LossPoint]
    resumed_from: int | None


def check_qat(config: QuantizeConfig) -> None:
    """Refuse methods whose weights do not lie on grids of the parent's own weights.

    Raises:
        ConfigError: that.
    """
    if config.method not in TRAINABLE:
        raise ConfigError(f"{config.method} cannot be trained further", expected=" or ".join(TRAINABLE))


def rotated(parent: Opened, source: Source) -> Decoder:
    """The parent once more, rotated as a child is before it is quantized."""
    decoder = load_model(
        parent.folder, dtype=parent.decoder.dtype, device=source.device, allow_pickle=source.allow_pickle
    )
    rotate_model(decoder)
    return decoder


def train_quantized(
    child: Decoder,
    parent: Decoder,
    examples: Sequence[Row],
    config: QatConfig,
    *,
    partial: PartialFolder,
    progress: Progress = silent,
    notify: Callable[[str], None] = tell_nobody,
) -> Qat:
    """Train the integers and scales of a quantized child, in place; what is best on some rows held back is kept.

    Args:
        child: as `quantize_model` left it.
        parent: the dense weights that were quantized; the training takes place on it, and gives it back as it was.
        examples: training rows; fewer than the steps ask for are seen again.
        partial: of the quantization. Checkpoints go there too; one that is there is gone on from.

    Raises:
        ConfigError: the checkpoint is of a training with other settings.
        DataError: too few rows to hold some back.
        BurnishError: as `train`.
        KeyboardInterrupt: it was stopped; what was learned until then is in `partial`.
    """
    started = {name: layer.quantized() for name, layer in quantized_linears(child).items()}
    held_back = min(MOST_HELD_BACK, len(examples) // 4)
    if not held_back:
        raise DataError("too few rows to train on and to hold some back", got=len(examples), expected="4 or more")
    rows, judges = examples[:-held_back], examples[-held_back:]
    checkpoints, found = _checkpoints(partial, config, examples, notify)
    steps: list[StepRecord] = []

    def on_step(step: StepRecord) -> None:
        steps.append(step)
        progress("Training on the grid", step.step, config.steps, f"loss {recent_loss(steps):.4f}")

    attach_fake_quant(parent, started, config.lora, seed=config.seed)
    try:
        result = train(
            parent,
            rows,
            config=config.training,
            eval_examples=judges,
            on_step=on_step,
            checkpoints=checkpoints,
            resume=found,
            parent=(lambda: parent_computes(parent)) if config.distill else None,
        )
    finally:
        trained = detach_fake_quant(parent)
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    _install(child, trained)
    curve = eval_points([to_plain(item) for item in result.eval])
    kept = min(curve, key=lambda point: point.loss)
    return Qat(
        steps=len(result.steps),
        num_rows=len(rows),
        num_held_back=held_back,
        seconds=result.seconds,
        tokens_per_s=result.tokens_per_s,
        loss_before=curve[0].loss,
        loss_after=kept.loss,
        kept_step=kept.step,
        changed=_changed(started, trained),
        loss=loss_points([to_plain(step) for step in result.steps]),
        held_back_loss=curve,
        resumed_from=result.resumed_from,
    )


def _checkpoints(
    partial: PartialFolder, config: QatConfig, examples: Sequence[Row], notify: Callable[[str], None]
) -> tuple[CheckpointFolder, Checkpoint | None]:
    identity = {
        **partial.identity,
        "training": to_plain(config),
        "rows": fingerprint([[*row.tokens, *row.labels] for row in examples]),
    }
    folder = CheckpointFolder(
        partial.folder / CHECKPOINTS, identity=identity, environment=partial.environment, notify=notify
    )
    found = folder.newest()
    if found is None:
        folder.clear()
        return folder, None
    different = first_difference(found.identity, identity)
    if different is not None:
        name, before, now = different
        raise ConfigError(
            f"{found.path} belongs to a training with another {name}: {before} there, {now} here",
            remedy="Give what that one was given, or begin anew with --resume never --overwrite.",
        )
    notify(f"going on after step {found.step}, from {found.path}")
    return folder, found


def _install(child: Decoder, trained: dict[str, QuantizedWeight]) -> None:
    for name, quantized in trained.items():
        layer = child.get_submodule(name)
        assert isinstance(layer, GroupQuantizedLinear)
        set_module(child, name, GroupQuantizedLinear.from_quantized(quantized, bias=layer.bias))


def _changed(before: dict[str, QuantizedWeight], after: dict[str, QuantizedWeight]) -> float:
    changed = sum(int((before[name].ints != after[name].ints).sum()) for name in before)
    return changed / sum(weight.ints.numel() for weight in before.values())
