"""What `plan` expects of a stage, for the record to set beside what was measured."""

from __future__ import annotations

from burnish.compress.config import QuantizeConfig
from burnish.engine.outputs import EngineStats
from burnish.models.decoder import Decoder
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig


def predicted_training_peak(
    decoder: Decoder, *, method: str, lora: LoraConfig, config: TrainConfig, longest: int
) -> int | None:
    return None


def predicted_merge_peak(decoder: Decoder) -> int | None:
    return None


def predicted_quantize_peak(decoder: Decoder, *, config: QuantizeConfig, num_tokens: int) -> int | None:
    return None


def predicted_inference_peak(decoder: Decoder, *, stats: EngineStats, longest: int) -> int | None:
    return None
