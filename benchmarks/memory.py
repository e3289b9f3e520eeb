"""Memory: how far loading goes over what it ends with, and the peak of W1 against weights and cache.

    python benchmarks/memory.py MODEL

Each load runs in a process of its own: bfloat16, and int8 and int4 for the first time (they are rounded, and kept in a
cache that is empty then) and from the cache. Bytes are of the process, less those it had before it loaded anything;
"ends with" is what it holds when the engine is ready. Pages of the checkpoint that the system keeps in memory for the
process count while they are mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from session import MIB, arguments, memory_note, open_engine, table, tell

LIMIT = 1.3


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--parts", default="load,w1", help="load, w1 or both")
    parser.add_argument("--quantizations", default="none,int8,int4")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # what a child process does
    flags = parser.parse_args()
    if flags.one:
        print(json.dumps(_load(flags)))
        return 0
    record: dict[str, Any] = {
        "work": "memory",
        "model": Path(flags.model).name,
        "dtype": flags.dtype,
        "threads": flags.threads,
    }
    parts: list[str] = []
    chosen = flags.quantizations.split(",")
    if "load" in flags.parts.split(","):
        record["loads"] = loads = _loads(flags, chosen)
        rows = [["load", "s", "ends with MiB", "peak MiB", "peak / end", "weights MiB"]]
        rows += [
            [
                name,
                f"{one['load_s']:.1f}",
                f"{one['end_mib']:.0f}",
                f"{one['growth_mib']:.0f}",
                f"{one['peak_over_end']:.2f}",
                f"{one['weights_mib']:.0f}",
            ]
            for name, one in loads.items()
        ]
        parts.append(table(rows))
    if "w1" in flags.parts.split(","):
        record["w1"] = passes = {quantize: _w1(flags, quantize) for quantize in chosen}
        rows = [["W1", "weights + KV MiB", "peak RSS MiB", "1.3 x (weights + KV) + 300 MiB"]]
        rows += [
            [
                name,
                f"{(one['weights_bytes'] + one['kv_bytes']) / MIB:.0f}",
                f"{one['peak_rss_mib']:.0f}",
                f"{one['peak_rss_limit_mib']:.0f}",
            ]
            for name, one in passes.items()
        ]
        parts.append(table(rows))
    tell(flags, record, "\n\n".join(parts))
    return 0


def _loads(flags: argparse.Namespace, chosen: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for quantize in chosen:
        if quantize == "none":
            found[flags.dtype] = _child(flags, quantize, cache=None)
            continue
        with tempfile.TemporaryDirectory() as cache:
            for turn in ("first time", "from the cache"):
                found[f"{quantize}, {turn}"] = one = _child(flags, quantize, cache=cache)
                if one["cached"] != (turn == "from the cache"):
                    raise SystemExit(f"{quantize}, {turn}: the cache did not do its part")
    return found


def _child(flags: argparse.Namespace, quantize: str, *, cache: str | None) -> dict[str, Any]:
    command = [sys.executable, __file__, flags.model, "--one", "--dtype", flags.dtype, "--quantize", quantize]
    command += ["--threads", str(flags.threads), *(["--kv-dtype", flags.kv_dtype] if flags.kv_dtype else [])]
    environment = {**os.environ, **({"BURNISH_CACHE": cache} if cache else {})}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(done.splitlines()[-1])


def _load(flags: argparse.Namespace) -> dict[str, Any]:
    memory: dict[str, Any] = {}
    with memory_note(memory):
        started = time.perf_counter()
        engine = open_engine(flags, max_num_seqs=32, max_model_len=257)
        seconds = time.perf_counter() - started
    stats = engine.stats()
    growth = memory["peak_rss_mib"] - memory["rss_before_mib"]
    end = memory["rss_after_mib"] - memory["rss_before_mib"]
    return {
        **memory,
        "load_s": round(seconds, 2),
        "end_mib": round(end, 1),
        "growth_mib": round(growth, 1),
        "peak_over_end": round(growth / end, 4),
        "weights_mib": round(stats.weights_bytes / MIB, 1),
        "backend": stats.backend,
        "cached": bool(engine.optimised and engine.optimised.cached),
    }


def _w1(flags: argparse.Namespace, quantize: str) -> dict[str, Any]:
    script = str(Path(__file__).with_name("w1_w2.py"))
    command = [sys.executable, script, flags.model, "--work", "w1", "--runs", "1", "--json", "--dtype", flags.dtype]
    command += ["--quantize", quantize, "--threads", str(flags.threads)]
    command += ["--kv-dtype", flags.kv_dtype] if flags.kv_dtype else []
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
