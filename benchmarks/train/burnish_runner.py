"""burnish's own trainer, on the rows as they are and in the order given."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from work import ALPHA, CLIP, RANK, SEED, Memory, Step, arguments, learning_rate, read_rows, report, status_mib

from burnish.compress.frozen_loading import FrozenFormat, load_frozen
from burnish.measure.hardware import version_record
from burnish.models.loading import load_decoder
from burnish.pipeline.predicted import predicted_training, rows_of_run
from burnish.train.adapter import load_adapter
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig, attach_lora
from burnish.train.results import StepRecord
from burnish.train.trainer import train

METHODS = {"none": "lora", "nf4": "qlora-4bit", "int8": "qlora-8bit"}


@dataclass(frozen=True)
class Row:
    """A row all of whose tokens are learned (the first has no predecessor)."""

    tokens: list[int]

    @property
    def labels(self) -> list[int]:
        return self.tokens


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--ordering", default="given", help='"given" is what the comparisons are made in')
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="more of TrainConfig")
    flags = parser.parse_args()
    if flags.method == "full" and flags.quantize != "none":
        parser.error("quantized weights are not trained in full")
    torch.set_num_threads(flags.threads)
    start_mib = status_mib("VmRSS")
    started = time.perf_counter()
    model = _load(flags)
    load_s = time.perf_counter() - started
    rows = read_rows(flags)
    config = _config(flags)
    examples = [Row(row) for row in rows]
    predicted = predicted_training(
        model, config=config, lora=LoraConfig(rank=RANK, alpha=ALPHA), rows=rows_of_run(examples, config)
    )
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.float().sum()
    memory = Memory()
    memory.mark_loaded()
    result = train(model, examples, config=config)
    if result.skipped_steps:
        raise SystemExit(f"{result.skipped_steps} steps were skipped: loss or gradient was not finite")
    positions = 1 / (1 - result.padding_share)
    report(
        flags,
        [_step(record, positions) for record in result.steps],
        memory,
        system="burnish",
        versions={name: text for name, text in version_record().items() if name in ("burnish", "torch")},
        settings={
            "precision_resolved": result.precision,
            "ordering": flags.ordering,
            "set": flags.set,
            "component_mib": _in_mib(result.component_bytes),
            # Of loading and training, over a process with its libraries: what `burnish plan` says, and what it was.
            "predicted_mib": round(sum(predicted.values()) / 2**20, 1),
            "predicted_component_mib": _in_mib(predicted),
            "growth_mib": round(memory.peak_mib() - start_mib, 1),
        },
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        load_s=load_s,
    )


def _load(flags: argparse.Namespace) -> nn.Module:
    """The decoder with its adapter. Full training keeps float32 weights in every precision but "bfloat16"."""
    dtype = torch.bfloat16 if flags.precision == "bfloat16" else torch.float32
    model: nn.Module
    if flags.quantize == "none":
        model = load_decoder(flags.model, dtype=dtype)
    else:
        model = load_frozen(Path(flags.model), FrozenFormat(kind=flags.quantize), dtype=dtype)
    if flags.method == "lora":
        if flags.adapter:
            load_adapter(model, flags.adapter)
        else:
            attach_lora(model, LoraConfig(rank=RANK, alpha=ALPHA), seed=SEED)
    return model


def _config(flags: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        method=METHODS[flags.quantize] if flags.method == "lora" else flags.method,
        steps=flags.warmup_steps + flags.steps,
        micro_batch_size=flags.micro,
        gradient_accumulation=-(-flags.rows_per_step // flags.micro),
        learning_rate=learning_rate(flags),
        schedule="constant",
        warmup=0,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        precision="float32" if flags.precision == "float32" else "bfloat16",
        ordering=flags.ordering,
        seed=SEED,
        **_checkpointing(flags.checkpoint_every),
        **dict(_field(text) for text in flags.set),
    )


def _checkpointing(every: int) -> dict[str, Any]:
    """0 keeps all activations, 1 recomputes every block, n every n-th."""
    return {"gradient_checkpointing": True, "checkpoint_every": every} if every else {}


def _in_mib(parts: Mapping[str, int]) -> dict[str, float]:
    return {name: round(size / 2**20, 1) for name, size in parts.items()}


def _field(text: str) -> tuple[str, Any]:
    """FIELD=VALUE, the value as JSON where it reads as such (4, 0.5, true, null)."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _step(record: StepRecord, positions: float) -> Step:
    """Padding is known for the whole run only."""
    return Step(
        loss=record.loss,
        seconds=record.seconds,
        tokens=record.tokens,
        positions=round(record.tokens * positions),
        **{f"{part}_s": record.phases.get(part) for part in ("forward", "backward", "optimizer")},
    )


if __name__ == "__main__":
    main()
