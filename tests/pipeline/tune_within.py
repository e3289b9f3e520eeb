"""A program: tune a tiny model within a budget and print what the process took at most. Run by test_tune_memory.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from burnish.measure.memory import MemoryMeter
from burnish.models.hf_config import load_config
from burnish.pipeline.examples import DataConfig
from burnish.pipeline.opening import Source, required_tokenizer
from burnish.pipeline.predicted import rows_of_run
from burnish.pipeline.training_data import training_data
from burnish.pipeline.tune import tune
from burnish.pipeline.tune_fit import Fitting
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig


def main(model: str, data: str, out: str, asked: dict[str, Any]) -> dict[str, Any]:
    """`share` places the budget between the least and the most that any choice takes."""
    config = TrainConfig(steps=3, micro_batch_size=8, method=asked["method"], precision=asked["precision"])
    source, rows_of = Source(dtype="auto", threads=1), DataConfig(source=data, max_length=asked["length"])
    with MemoryMeter(trim=False) as meter:
        rows = training_data(rows_of, required_tokenizer(Path(model)))
        fitting = Fitting(load_config(model), rows_of_run(rows.examples, config), config, LoraConfig(), source)
        needs = [fitting.needs(way) for way in fitting.candidates()]
        budget = int(min(needs) + (2 << 20) + asked["share"] * (max(needs) - min(needs)))  # the start moves a little
        record = tune(model, data=rows_of, out=out, config=config, source=source, memory=budget)
        assert record.fit is not None
        return {"budget": budget, "peak": meter.peak_bytes, "fit": record.fit}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4], json.loads(sys.argv[4]))))
