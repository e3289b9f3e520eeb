"""burnish's commands on random weights in a shape: the most memory that each of them took."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.models.loading import load_config
from burnish.models.shapes import hf_config_of_shape
from burnish.models.synth import write_random_checkpoint
from burnish.plan.options import PlanOptions
from burnish.plan.planning import plan

REQUEST = ("--concurrency", "1", "--input-tokens", "128", "--output-tokens", "128")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A shape to measure: a published one, or the same family made small."""

    published: str
    methods: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        return bool(self.changes)

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return hf_config_of_shape(self.published) | self.changes


ALL_METHODS = ("lora", "qlora-8bit", "qlora-4bit")
MEASURED = {
    "bloom-small": Shape(
        published="bloom-1b1", methods=ALL_METHODS, changes={"hidden_size": 768, "n_layer": 12, "vocab_size": 32000}
    ),
    "falcon-small": Shape(
        published="falcon-7b",
        methods=ALL_METHODS,
        changes={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 32000},
    ),
    "codegen2-small": Shape(
        published="codegen2-1b",
        methods=ALL_METHODS,
        changes={"n_embd": 768, "n_layer": 12, "n_head": 8, "head_dim": 96, "rotary_dim": 32, "vocab_size": 32000},
    ),
    "bloom-1b1": Shape(published="bloom-1b1", methods=("lora", "qlora-4bit")),
    "codegen2-1b": Shape(published="codegen2-1b", methods=("lora", "qlora-8bit")),
    "bloom-7b1": Shape(published="bloom-7b1", methods=("lora", "qlora-4bit")),
    "falcon-7b": Shape(published="falcon-7b", methods=("lora", "qlora-8bit")),
}


def measure_row(name: str, method: str, flags: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the stages one after the other; each stage is {"bytes", "predicted", "seconds"} or {"error"}.

    A stage that fails ends the row: what comes after it needs what it would have made.
    """
    model = folder / name
    if not model.is_dir():
        write_random_checkpoint(MEASURED[name].config(), model)
    made = folder / f"{model.name}-{method}"
    row: dict[str, Any] = {
        "name": name,
        "method": method,
        "device": flags.device,
        "parameters": load_config(model).num_parameters(),
        "stages": {},
    }
    for stage, command in _commands(model, method, flags, made):
        found = _run(command, flags)
        if isinstance(found, str):
            row["stages"][stage] = {"error": found}
            print(f"  {stage}: {found}", flush=True)
            break
        for part, figures in _figures(stage, found, made, flags).items():
            row["stages"][part] = figures
            print(f"  {part}: {figures['bytes'] / 2**20:.0f} MiB", flush=True)
    return row


def _commands(model: Path, method: str, flags: argparse.Namespace, made: Path) -> list[tuple[str, list[str]]]:
    adapter, merged, quantized = (str(made / part) for part in ("adapter", "merged", "gptq8"))
    rows = "text-to-sql:train:256"
    base = ["--dtype", "float32", "--precision", "float32"] if method == "lora" else []
    tune = [
        "tune",
        str(model),
        "--data",
        rows,
        "--out",
        adapter,
        "--method",
        method,
        *base,
        "--steps",
        str(flags.steps),
    ]
    bench = ["bench", *REQUEST, "--repeats", "1", "--warmup", "1", "--speculation", "off"]
    quantize = ["--bits", "8", "--group-size", "128", "--damping", "0.1", "--calibration", rows]
    # Random weights say nothing sensible, so the gates must not judge them, nor have them answer questions (which they
    # do to the last token allowed); the stage of 4 bits rounds while it loads.
    unjudged = ["--max-kl", "1000", "--min-agreement", "0", "--gate-rows", "0"]
    return [
        ("training", tune),
        ("merge", ["merge", adapter, "--out", merged, "--overwrite", *unjudged]),
        ("quantize", ["quantize", merged, "--out", quantized, *quantize, "--samples", str(flags.samples), *unjudged]),
        ("inference float32", [*bench, merged, "--dtype", "float32"]),
        ("inference gptq8", [*bench, quantized]),
        ("inference int8", [*bench, merged, "--quantize", "int8", "--no-weights-cache"]),
        ("inference int4", [*bench, merged, "--quantize", "int4", "--no-weights-cache"]),
    ]


def _figures(stage: str, record: dict[str, Any], made: Path, flags: argparse.Namespace) -> dict[str, dict[str, Any]]:
    if not stage.startswith("inference"):
        found = {
            stage: {
                "bytes": record["peak_memory_bytes"],
                "predicted": record["predicted_peak_bytes"],
                "seconds": record["seconds"],
            }
        }
        loaded = record.get("loaded_memory_bytes")
        if loaded is None:
            return found
        return {"load": {"bytes": loaded, "predicted": _load_prediction(record)}} | found
    kind = stage.removeprefix("inference ")
    folder = str(made / ("gptq8" if kind == "gptq8" else "merged"))
    options = PlanOptions(
        dtype="float32" if kind == "float32" else "auto",
        weight_format=None if kind in ("float32", "gptq8") else kind,
        concurrency=1,
    )
    prediction = plan(folder, device=flags.device, options=options, stages=("inference",)).stage("inference")
    return {stage: {"bytes": record["memory_growth_bytes"], "predicted": prediction.growth_bytes}}


def _load_prediction(record: dict[str, Any]) -> int:
    """Bytes of the weights as the method holds them, and what reading touches for the first time."""
    dense = record["method"] == "lora"
    options = PlanOptions(dtype="float32", precision="float32" if dense else "auto")
    parts = {stage: plan(record["base"], options=options, stages=(stage,)).stage(stage).components
             for stage in ("load", record["method"])}  # fmt: skip
    return parts[record["method"]]["weights"] + parts["load"]["first use"] + parts["load"]["reading"]


def _run(command: Sequence[str], flags: argparse.Namespace) -> dict[str, Any] | str:
    """The command's JSON document, or the one line it ended with."""
    options = ["--json", "--quiet", "--device", flags.device, "--threads", str(flags.threads), "--offline"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(flags.threads), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "burnish.cli.main", *command, *options],
            env=environment,
            capture_output=True,
            text=True,
            timeout=flags.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no result within {flags.timeout:.0f} s"
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        return said[-1] if said else f"ended with {done.returncode}, without a word"
    return json.loads(done.stdout)
