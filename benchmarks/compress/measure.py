"""One variant, measured in a process of its own: loading, memory, answers and distance from its parent, speed.

    python benchmarks/compress/measure.py VARIANT --parent MODEL --answers ANSWERS.json --what quality,speed

Prints a line, RESULT and JSON. Memory is what the process grew by over the state in which burnish was imported.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from burnish.engine.protocol import Engine
from burnish.measure.bench import Workload, run_bench
from burnish.measure.compare import compare_models
from burnish.measure.evaluate import Answer, SqlScore
from burnish.measure.memory import MemoryMeter, release_free_memory, resident_bytes
from burnish.measure.paired import compare_answers, excludes
from burnish.pipeline.evaluate import score_rows, template_for
from burnish.pipeline.examples import DataConfig, prepare, read_data
from burnish.pipeline.foreign_models import CTranslate2Model
from burnish.pipeline.gates import judge, layer_errors, limits_of_child
from burnish.pipeline.manifest import read_manifest
from burnish.pipeline.opening import Opened, Source, engine_of, open_decoder, open_engine, required_tokenizer

MAX_ANSWER = 96
MAX_MODEL_LEN = 320
SPEED = {
    1: Workload(input_tokens=128, output_tokens=32, concurrency=1),
    8: Workload(input_tokens=128, output_tokens=32, concurrency=8),
}
COMPARED_ROWS = 100
MOST_CHANGED = 8
"""Negations that only the parent got right, kept as examples."""


def main() -> None:
    flags = _arguments()
    torch.set_num_threads(flags.threads)
    found: dict[str, Any] = {"threads": flags.threads}
    foreign = flags.engine != "native"
    opened = None
    with MemoryMeter() as meter:
        before, started = resident_bytes(), time.perf_counter()
        if foreign:
            engine = open_engine(flags.variant, Source(), engine=flags.engine, max_num_seqs=32)
        else:
            opened = open_decoder(flags.variant, Source())
            engine = engine_of(opened, max_num_seqs=32, max_model_len=MAX_MODEL_LEN, optimise=True)
        engine.warm_up()
        found["load_seconds"] = time.perf_counter() - started
        release_free_memory()
        found["load_memory_bytes"] = max(0, resident_bytes() - before)
        if "speed" in flags.what:
            found["speed"] = _speed(engine, flags.parent, repeats=flags.repeats)
        score = _answers(engine, flags, opened) if "quality" in flags.what else None
    found["inference_memory_bytes"] = meter.growth_bytes
    if score is not None:
        found["quality"] = _quality(score, flags)
    print("RESULT " + json.dumps(found), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant")
    parser.add_argument("--parent", required=True)
    parser.add_argument("--answers", type=Path, required=True, help="the parent's answers; written when it is measured")
    parser.add_argument("--engine", default="native", choices=("native", "ctranslate2"))
    parser.add_argument("--what", default="quality,speed")
    parser.add_argument("--data", default="text-to-sql:test:300", help="held-out rows, seen by no other stage")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _speed(engine: Engine, parent: str, *, repeats: int) -> dict[str, Any]:
    """Output tokens a second at 1 and 8 at once, each of the repeats, and the time to the first token."""
    config = json.loads((Path(parent) / "config.json").read_text())
    found: dict[str, Any] = {}
    for concurrency, workload in SPEED.items():
        result = run_bench(engine, workload, vocab_size=config["vocab_size"], repeats=repeats)
        found[f"output_tokens_per_s_{concurrency}"] = result.output_tokens_per_s
        found[f"spread_{concurrency}"] = list(result.spread["output_tokens_per_s"])
        found[f"ttft_ms_{concurrency}"] = result.ttft_ms["p50"]
    return found


def _answers(engine: Engine, flags: argparse.Namespace, opened: Opened | None) -> SqlScore:
    data = DataConfig(source=flags.data)
    rows = read_data(data)
    model = opened or open_decoder(flags.parent, Source())
    template = template_for(model, data, rows)
    tokenizer = required_tokenizer(Path(flags.parent))
    score = score_rows(engine, rows.rows, tokenizer, template, max_tokens=MAX_ANSWER)
    assert isinstance(score, SqlScore)
    return score


def _quality(score: SqlScore, flags: argparse.Namespace) -> dict[str, Any]:
    """The score beside the parent's, and the distance on the test rows' expected answers."""
    if Path(flags.variant) == Path(flags.parent):
        flags.answers.write_text(json.dumps(score.to_dict()))
    theirs = json.loads(flags.answers.read_text())
    theirs["answers"] = tuple(Answer(**answer) for answer in theirs["answers"])
    task = compare_answers(SqlScore(**theirs), score)
    parent = open_decoder(flags.parent, Source())
    child: Any
    if flags.engine == "ctranslate2":
        child = CTranslate2Model(Path(flags.variant), threads=flags.threads)
    else:
        child = open_decoder(flags.variant, Source()).decoder
    data = DataConfig(
        source=flags.data,
        limit=COMPARED_ROWS,
        template=template_for(
            parent, DataConfig(source=flags.data), read_data(DataConfig(source=flags.data, limit=1))
        ).name,
    )
    examples = prepare(data, parent.tokenizer).examples.examples
    comparison = compare_models(child, parent.decoder, examples, window=512)
    found = {"task": task.to_dict(), "distance": comparison.to_dict()}
    lost = [answer for answer in found["task"]["changed"] if answer["lost"] and excludes(answer["gold"])]
    found["task"]["changed"] = lost[:MOST_CHANGED]
    manifest = read_manifest(Path(flags.variant))
    if manifest is not None and manifest.get("gate") and Path(flags.variant) != Path(flags.parent):
        limits = limits_of_child(manifest, {})
        assert limits is not None
        gate = judge(comparison, limits, layers=layer_errors(manifest), task=task)
        found |= {"verdict": gate.verdict, "reasons": list(gate.reasons)}
    return found


if __name__ == "__main__":
    main()
