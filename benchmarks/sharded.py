"""One process, tensor-parallel 2 and pipeline-parallel 2 on one model, in turn: tokens/s and memory of each rank.

    python benchmarks/sharded.py MODEL [--dtype bfloat16] [--rounds 3] [--json FILE]

Every measurement is a process of its own that holds one engine. A rank's memory is what its process takes at the end
over a process that has only imported what a rank imports; the whole is the same of one process on the torch backend,
which is what the ranks compute with. The compiled kernels in one process stand beside them for speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAYS = {
    "one process, kernels": {"backend": "auto", "threads": 2},
    "one process, torch": {"backend": "torch", "threads": 2},
    "tensor-parallel 2": {"tensor_parallel": 2, "threads": 1},
    "pipeline-parallel 2": {"pipeline_parallel": 2, "threads": 1},
}
BASELINE = (
    "import psutil, burnish.engine.native, burnish.engine.shard_worker as w; print(psutil.Process().memory_info().rss)"
)
MIB = 2**20


def measure(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """One engine's run, in this process."""
    import psutil
    import torch

    from burnish.engine.native import NativeEngine
    from burnish.engine.sampling import SamplingParams

    before = psutil.Process().memory_info().rss
    work = options.pop("work")
    length = work["input"] + work["output"]
    engine = NativeEngine(
        model,
        max_num_seqs=work["concurrency"],
        max_model_len=length,
        speculation="off",
        **options,
    )
    engine.warm_up()
    generator = torch.Generator().manual_seed(1)
    params = SamplingParams(max_tokens=work["output"], ignore_eos=True)
    rates, answers = [], []
    for turn in range(2):
        shape = (work["concurrency"], work["input"])
        prompts = torch.randint(3, 1000, shape, generator=generator).tolist()
        started = time.perf_counter()
        answers = [output.token_ids for output in engine.generate(prompts, params)]
        if turn:
            rates.append(work["concurrency"] * length / (time.perf_counter() - started))
    stats = engine.stats()
    ranks = [
        {"weights": rank.weights_bytes, "kv": rank.kv_bytes, "resident": rank.resident_bytes}
        for rank in engine.rank_memory()
    ] or [{"weights": stats.weights_bytes, "kv": stats.kv_bytes, "resident": psutil.Process().memory_info().rss}]
    engine.close()
    return {"tokens_per_s": rates[0], "ranks": ranks, "before": before, "dtype": stats.dtype, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.model, json.loads(args.one))))
        return
    baseline = int(subprocess.run([sys.executable, "-c", BASELINE], capture_output=True, text=True, check=True).stdout)
    work = {"concurrency": args.concurrency, "input": args.input, "output": args.output}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    loads = []
    for _ in range(args.rounds):
        for name, options in WAYS.items():
            loads.append(os.getloadavg()[0])
            given = json.dumps({**options, "dtype": args.dtype, "work": work})
            run = subprocess.run(
                [sys.executable, __file__, args.model, "--one", given], capture_output=True, text=True, check=True
            )
            found[name].append(json.loads(run.stdout))
    whole = found["one process, torch"][-1]
    held = whole["ranks"][0]["weights"] + whole["ranks"][0]["kv"]
    grown = statistics.median(run["ranks"][0]["resident"] - baseline for run in found["one process, torch"])
    print(f"{args.model}, {whole['dtype']}, {work}, {args.rounds} rounds, import baseline {baseline / MIB:.0f} MiB")
    print(f"load average before each: {min(loads):.1f} to {max(loads):.1f}")
    for name, runs in found.items():
        rates = [run["tokens_per_s"] for run in runs]
        same = runs[-1]["answers"] == whole["answers"]
        print(f"{name}: {statistics.median(rates):.0f} tokens/s ({min(rates):.0f} to {max(rates):.0f}), same {same}")
        for number, rank in enumerate(runs[-1]["ranks"]):
            own = rank["weights"] + rank["kv"]
            over = statistics.median(run["ranks"][number]["resident"] for run in runs) - baseline
            print(
                f"  rank {number}: weights {rank['weights'] / MIB:.1f} + KV {rank['kv'] / MIB:.1f} MiB = "
                f"{own / held:.1%}; process {over / MIB:.0f} MiB over its imports = {over / grown:.1%}"
            )
    if args.json:
        for runs in found.values():
            for run in runs:
                run.pop("answers")
        args.json.write_text(json.dumps({"baseline": baseline, "work": work, "loads": loads, "found": found}, indent=1))


if __name__ == "__main__":
    main()
