"""Does `tune --memory` keep to its budget, and is what it chooses fast?

    python benchmarks/train/fits.py --out fits.json               # 20 settings, then every way that fits on one shape
    python benchmarks/train/fits.py --settings 6 --no-exhaustive

Each setting (shape, length, method, budget; drawn from --seed) is tuned by itself in a process of its own, whose peak
resident set is held against the budget. The exhaustive part runs every way to cut a step up that fits, in one process
after the other, and says how far the chosen one is from the fastest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 2**20
METHODS = ("lora", "lora", "qlora-4bit", "qlora-8bit", "full")
SMALL = {"hidden": 256, "layers": 8, "length": 256, "rows": 96, "method": "lora", "precision": "auto", "share": 0.5}
STEPS, ROWS_PER_STEP = 6, 8


def drawn(count: int, seed: int) -> list[dict[str, Any]]:
    """Settings to try; `share` places the budget between the least and the most that any choice would take."""
    source = random.Random(seed)
    return [
        {
            "hidden": source.choice((64, 128, 192, 256, 320)),
            "layers": source.randint(2, 12),
            "length": source.choice((48, 96, 160, 256, 400)),
            "rows": 64,
            "method": METHODS[number % len(METHODS)],
            "precision": source.choice(("auto", "auto", "float32")),
            "share": round(source.uniform(0.02, 0.9), 2),
            "seed": number,
        }
        for number in range(count)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exhaustive", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="write everything here as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        print("RESULT " + json.dumps(run(json.loads(flags.one), flags.way and json.loads(flags.way), flags.threads)))
        return 0
    results = [child(setting, flags) for setting in drawn(flags.settings, flags.seed)]
    for result in results:
        print(line(result), flush=True)
    over = [result for result in results if result.get("peak_bytes", 0) > result.get("budget_bytes", 0)]
    print(f"{len(results)} settings, {len(over)} beyond their budget")
    record: dict[str, Any] = {"settings": results}
    if flags.exhaustive:
        record["exhaustive"] = exhaustive(flags)
    if flags.out:
        flags.out.write_text(json.dumps(record, indent=2), encoding="utf-8")
    return 1 if over else 0


def child(setting: dict[str, Any], flags: argparse.Namespace, way: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run one setting in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(flags.threads), "--one", json.dumps(setting)]
    command += ["--way", json.dumps(way)] if way else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(flags.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if not found:
        raise SystemExit(f"{setting}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return {"asked": setting, **json.loads(found[0].removeprefix("RESULT "))}


def line(result: dict[str, Any]) -> str:
    """One setting as a line."""
    asked = result["asked"]
    shape = f"{asked['hidden']:4d} x {asked['layers']:2d}, {asked['length']:3d} tokens, {asked['method']:10s}"
    sizes = [f"{result[name] / MIB:6.0f}" for name in ("budget_bytes", "predicted_bytes", "peak_bytes")]
    kept = "ok  " if result["peak_bytes"] <= result["budget_bytes"] else "OVER"
    ratio = result["predicted_bytes"] / result["peak_bytes"]
    return (
        f"{shape} budget {sizes[0]}, predicted {sizes[1]}, peak {sizes[2]} MiB ({ratio:.2f}) {kept} {result['chosen']}"
    )


def exhaustive(flags: argparse.Namespace) -> dict[str, Any]:
    """Every way that fits the small shape, against the one that is chosen."""
    chosen = child(SMALL, flags)
    rows = [child(SMALL, flags, way) for way in chosen["ways"]]
    best = max(rows, key=lambda row: row["tokens_per_s"])
    own = next(row for row in rows if row["chosen"] == chosen["chosen"])
    for row in sorted(rows, key=lambda row: -row["tokens_per_s"]):
        mark = " <- chosen" if row["chosen"] == chosen["chosen"] else ""
        print(f"{row['tokens_per_s']:8.0f} tokens/s  {row['peak_bytes'] / MIB:6.0f} MiB  {row['chosen']}{mark}")
    slower = 1 - own["tokens_per_s"] / best["tokens_per_s"]
    print(f"chosen: {slower:.1%} slower than the best of {len(rows)} within {chosen['budget_bytes'] / MIB:.0f} MiB")
    return {"chosen": chosen, "ways": rows, "slower": slower}


def run(asked: dict[str, Any], way: dict[str, Any] | None, threads: int) -> dict[str, Any]:
    """In the process: make model and rows, tune, and say what it took."""
    from burnish.measure.memory import MemoryMeter

    with tempfile.TemporaryDirectory() as name, MemoryMeter(trim=False) as meter:
        folder = Path(name)
        write_model(folder / "model", asked)
        write_rows(folder / "rows.jsonl", asked)
        meter_start = meter.peak_bytes  # making the model is not part of the work; it is small
        result = tuned(folder, asked, way, threads)
        return {**result, "peak_bytes": meter.peak_bytes, "before_bytes": meter_start}


def tuned(folder: Path, asked: dict[str, Any], way: dict[str, Any] | None, threads: int) -> dict[str, Any]:
    from burnish.models.hf_config import load_config
    from burnish.pipeline.examples import DataConfig
    from burnish.pipeline.opening import Source, required_tokenizer
    from burnish.pipeline.predicted import rows_of_run
    from burnish.pipeline.training_data import training_data
    from burnish.pipeline.tune import tune
    from burnish.pipeline.tune_fit import Fitting
    from burnish.train.config import TrainConfig
    from burnish.train.fitting import Setting
    from burnish.train.lora import LoraConfig

    model, data = str(folder / "model"), DataConfig(source=str(folder / "rows.jsonl"), max_length=512)
    config = TrainConfig(
        method=asked["method"], steps=STEPS, micro_batch_size=ROWS_PER_STEP, precision=asked["precision"]
    )
    source, lora = Source(dtype="auto", threads=threads), LoraConfig(rank=8)
    shape = load_config(model)
    rows = training_data(data, required_tokenizer(folder / "model"), longest=shape.max_position_embeddings)
    fitting = Fitting(shape, rows_of_run(rows.examples, config), config, lora, source)
    ways = {way: fitting.needs(way) for way in fitting.candidates()}
    least, most = min(ways.values()), max(ways.values())
    budget = int(least + 4 * MIB + asked["share"] * (most - least))  # what is there at the start varies a little
    if way is not None:
        config = Setting(**way).applied(config)
        one = (
            source
            if config.method == "full" or config.precision != "bfloat16"
            else Source(dtype="bfloat16", threads=threads)
        )
        record = tune(model, data=data, out=folder / "out", lora=lora, config=config, source=one)
        chosen, predicted = str(Setting(**way)), ways[Setting(**way)]
    else:
        record = tune(model, data=data, out=folder / "out", lora=lora, config=config, source=source, memory=budget)
        assert record.fit is not None
        chosen, start = record.fit["setting"], record.fit["start_bytes"]
        predicted = start + record.fit["predicted_peak_bytes"]
    return {
        "budget_bytes": budget,
        "predicted_bytes": predicted,
        "chosen": chosen,
        "tokens_per_s": record.tokens_per_s,
        "probe_bytes": None if record.fit is None else record.fit["start_bytes"] + record.fit["measured_peak_bytes"],
        "losses": [step["loss"] for step in record.steps],
        "ways": [vars(one) for one, size in ways.items() if size <= budget],
    }


def write_model(folder: Path, asked: dict[str, Any]) -> None:
    """Random weights with the bundled tokenizer."""
    from burnish.data.bundled import bundled_path
    from burnish.models.shapes import hf_config_of_shape
    from burnish.models.synth import write_random_checkpoint

    hidden = asked["hidden"]
    changes = {
        "vocab_size": 3072,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": asked["layers"],
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 32,
        "max_position_embeddings": 1024,
    }
    write_random_checkpoint(hf_config_of_shape("135m") | changes, folder, dtype="float32")
    for path in bundled_path("burnish-sql-base").iterdir():
        if path.name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(path, folder / path.name)


def write_rows(path: Path, asked: dict[str, Any]) -> None:
    """Texts of up to about `length` tokens."""
    source = random.Random(asked.get("seed", 0))
    words = ["SELECT", "name", "FROM", "ship", "WHERE", "built", "harbour", "captain", "and", "count"]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(asked["rows"]):
            count = source.randint(asked["length"] // 6, asked["length"] // 2)
            file.write(json.dumps({"text": " ".join(source.choice(words) for _ in range(count))}) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
