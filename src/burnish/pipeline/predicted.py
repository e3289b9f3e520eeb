"""What `plan` expects of a stage that is about to run, for the record to set beside what is measured.

Predictions are growth over a process that has its libraries imported, as the meter counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from burnish.compress.config import QuantizeConfig
from burnish.models.decoder import Decoder
from burnish.plan.options import PlanOptions
from burnish.plan.predict import predict_stage
from burnish.train.batches import TrainingExample
from burnish.train.config import TrainConfig
from burnish.train.fitting import MicroBatches, Rows
from burnish.train.inputs import order_of_rows, total_steps
from burnish.train.lora import LoraConfig
from burnish.train.profile import COMPONENTS


def _growth(decoder: Decoder, stage: str, options: PlanOptions) -> int:
    device = "cpu" if decoder.device.type == "cpu" else "cuda"
    return predict_stage(decoder.config, stage, device=device, options=options).growth_bytes


_COMPONENTS = {
    "weights": "weights",
    "cast weights": "weights",
    "joined adapters": "weights",
    "adapter": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
}  # of `predict_stage` -> as the training loop measures; everything else is "other"


def training_options(
    config: TrainConfig, lora: LoraConfig, *, dtype: str, longest: int, batches: MicroBatches
) -> PlanOptions:
    """What `plan` is to assume of a run.

    Args:
        dtype: that the weights are loaded in.
        longest: tokens of the longest row.
        batches: its micro-batches.
    """
    adapted = config.method != "full"
    return PlanOptions(
        dtype=dtype,
        micro_batch_size=config.micro_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        packing=config.packing,
        fused=config.precision != "float16",
        dora=adapted and lora.use_dora,
        dropout=adapted and lora.dropout > 0,
        sequence_tokens=longest,
        positions=batches.positions,
        labels=max(1, batches.labels),
        widths=batches.widths,
        gradient_checkpointing=config.gradient_checkpointing,
        checkpoint_every=config.checkpoint_every,
        optimizer=config.optimizer,
        precision="bfloat16" if config.precision == "float16" else config.precision,
        rank=lora.rank,
        target_modules=lora.target_modules,
    )


def rows_of_run(examples: Sequence[TrainingExample], config: TrainConfig) -> Rows:
    """The rows of a run as far as memory and time hang on them."""
    order = order_of_rows(examples, config)
    return Rows(examples, order, steps=total_steps(order, config))


def batches_of(rows: Rows, config: TrainConfig, *, device: str, only: Sequence[int] | None = None) -> MicroBatches:
    """The micro-batches that a run's settings make of its rows, or of the step that consists of `only`."""
    most = config.tokens_at_once(device)
    if only is not None:
        return rows.count([list(only)], max_rows=config.micro_batch_size, max_tokens=most)
    return rows.micro_batches(max_rows=config.micro_batch_size, max_tokens=most)


def predicted_training(decoder: Decoder, *, config: TrainConfig, lora: LoraConfig, rows: Rows) -> dict[str, int]:
    """Bytes that loading and training a model will take, by the components that training measures."""
    device = "cpu" if decoder.device.type == "cpu" else "cuda"
    options = training_options(
        config,
        lora,
        dtype=str(decoder.dtype).removeprefix("torch."),
        longest=rows.longest,
        batches=batches_of(rows, config, device=device),
    )
    prediction = predict_stage(decoder.config, config.method, device=device, options=options)
    return as_measured(prediction.components)


def as_measured(components: Mapping[str, int]) -> dict[str, int]:
    """Predicted bytes by the components that training measures; what was there at the start is none of them."""
    parts: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
    for name, size in components.items():
        if name != "runtime":
            parts[_COMPONENTS.get(name, "other")] += size
    return parts


def predicted_merge_peak(decoder: Decoder, *, rank: int) -> int:
    """Bytes that merging, reading back and comparing will take."""
    return _growth(decoder, "merge", PlanOptions(rank=rank))


def predicted_quantize_peak(decoder: Decoder, *, config: QuantizeConfig, num_tokens: int) -> int:
    """Bytes that quantizing and comparing will take."""
    options = PlanOptions(
        dtype=str(decoder.dtype).removeprefix("torch."),
        bits=config.bits,
        group_size=config.group_size,
        hessians=config.corrects or config.scales,
        calibration_tokens=max(1, num_tokens),
        calibration_batch_tokens=config.batch_tokens,
    )
    return _growth(decoder, "quantize", options) + (_matching(decoder, num_tokens) if config.match_parent else 0)


def _matching(decoder: Decoder, num_tokens: int) -> int:
    """Bytes of the parent beside: its hidden states, a copy of a block, and of the widest linear's inputs two second
    moments over all tokens and over each half, of which one is there anyway, with two more inverses."""
    block = sum(parameter.numel() for parameter in decoder.model.layers[0].parameters())
    widest = max(in_features for _, in_features in decoder.config.linear_shapes().values())
    size = decoder.dtype.itemsize
    return (num_tokens * decoder.config.hidden_size + block) * size + 7 * widest**2 * 4


def predicted_inference_peak(
    decoder: Decoder, *, weight_format: str | None, concurrency: int, input_tokens: int, output_tokens: int
) -> int:
    """Bytes that loading a model and serving this many requests at once will take."""
    options = PlanOptions(
        dtype=str(decoder.dtype).removeprefix("torch."),
        weight_format=weight_format,
        concurrency=concurrency,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
    )
    return _growth(decoder, "inference", options)
