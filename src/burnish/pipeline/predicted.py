"""What `plan` expects of a stage that is about to run, for the record to set beside what is measured.

Predictions are growth over a process that has its libraries imported, as the meter counts.
"""

from __future__ import annotations

from burnish.compress.config import QuantizeConfig
from burnish.models.decoder import Decoder
from burnish.plan.options import PlanOptions
from burnish.plan.predict import predict_stage
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig
from burnish.train.profile import COMPONENTS


def _growth(decoder: Decoder, stage: str, options: PlanOptions) -> int:
    device = "cpu" if decoder.device.type == "cpu" else "cuda"
    return predict_stage(decoder.config, stage, device=device, options=options).growth_bytes


_COMPONENTS = {
    "weights": "weights",
    "cast weights": "weights",
    "adapter": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "activations",
}  # of `predict_stage` -> as the training loop measures; everything else is "other"


def predicted_training(
    decoder: Decoder, *, config: TrainConfig, lora: LoraConfig, longest: int, label_tokens: int
) -> dict[str, int]:
    """Bytes that loading and training a model will take, by the components that training measures.

    Args:
        longest: tokens of the longest example.
        label_tokens: learned tokens of an example, on average.
    """
    options = PlanOptions(
        dtype=str(decoder.dtype).removeprefix("torch."),
        micro_batch_size=config.micro_batch_size,
        sequence_tokens=longest,
        label_tokens=max(1, label_tokens),
        gradient_checkpointing=config.gradient_checkpointing,
        precision=config.precision,
        rank=lora.rank,
        target_modules=lora.target_modules,
    )
    device = "cpu" if decoder.device.type == "cpu" else "cuda"
    prediction = predict_stage(decoder.config, config.method, device=device, options=options)
    parts: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
    for name, size in prediction.components.items():
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
        calibration_tokens=max(1, num_tokens),
        calibration_batch_tokens=config.batch_tokens,
    )
    return _growth(decoder, "quantize", options)


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
