"""W1 and W2: 32 requests at once, or one alone, of 128 tokens in and 128 out.

    python benchmarks/w1_w2.py MODEL --work w1 --quantize int8

The same work as of the adapters in peers/, with what only the engine itself can tell: where the time of a step goes,
and the memory that weights and cache take. The peak of memory is the process's, loading included.
"""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import Any

import numpy as np
from peers.work import WORKS, Pass, Work, measure
from session import MIB, arguments, memory_note, open_engine, percent, record_of, shares, spread, table, tell

from burnish.engine.native import NativeEngine
from burnish.engine.outputs import EngineStats
from burnish.engine.sampling import SamplingParams


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--work", choices=sorted(WORKS), required=True)
    parser.add_argument("--requests", type=int, help="another number of requests, to try it out")
    parser.add_argument("--output-tokens", type=int, help="another length of the answers, to try it out")
    flags = parser.parse_args()
    work = WORKS[flags.work]
    work = Work(
        work.name, flags.requests or work.requests, work.input_tokens, flags.output_tokens or work.output_tokens
    )
    memory: dict[str, Any] = {}
    with memory_note(memory):
        engine = open_engine(
            flags, max_num_seqs=work.requests, max_model_len=work.input_tokens + work.output_tokens + 1
        )
        passes, readings = run_passes(engine, work, flags.runs)
    stats = engine.stats()
    walls = [done.wall_s for done in passes]
    total = work.requests * (work.input_tokens + work.output_tokens)
    record = {
        **record_of(work.name, flags, stats),
        "requests": work.requests,
        "input_tokens": work.input_tokens,
        "output_tokens": work.output_tokens,
        "walls_s": [round(wall, 4) for wall in walls],
        "total_tokens_per_s": [round(total / wall, 2) for wall in walls],
        "load_s": round(stats.load_s + stats.optimise_s, 2),
        **shares(readings[0], readings[-1], sum(walls)),
        "weights_bytes": stats.weights_bytes,
        "kv_bytes": stats.kv_bytes,
        "bytes_read_per_token": bytes_read_per_token(engine, context=work.input_tokens + work.output_tokens // 2),
        **memory,
    }
    record["peak_rss_limit_mib"] = round(1.3 * (stats.weights_bytes + stats.kv_bytes) / MIB + 300, 1)
    rows = [["figure", "value"], ["total tokens/s", spread(record["total_tokens_per_s"])]]
    if work.requests == 1:
        timed = [(done.wall_s, done.ttft_s or 0.0) for done in passes]
        record["ttft_ms"] = [round(ttft * 1e3, 2) for _, ttft in timed]
        record["decode_tokens_per_s"] = [round((work.output_tokens - 1) / (wall - ttft), 3) for wall, ttft in timed]
        rows += [
            ["TTFT ms", spread(record["ttft_ms"], 0)],
            ["decode tokens/s", spread(record["decode_tokens_per_s"], 2)],
            ["read per token, MiB", f"{record['bytes_read_per_token'] / MIB:.0f}"],
        ]
    rows += [
        ["outside the backend, of steps", percent(record["overhead_of_steps"])],
        ["outside the backend, of the wall clock", percent(record["overhead_of_wall"])],
        ["peak RSS MiB", f"{record['peak_rss_mib']:.0f}"],
        ["1.3 x (weights + KV) + 300, MiB", f"{record['peak_rss_limit_mib']:.0f}"],
        ["median pass, s", f"{median(walls):.2f}"],
    ]
    tell(flags, record, table(rows))
    return 0


def run_passes(engine: NativeEngine, work: Work, runs: int) -> tuple[list[Pass], list[EngineStats]]:
    """The measured passes, and the engine's stats after the warm-up and after each of them."""
    params = SamplingParams(max_tokens=work.output_tokens, ignore_eos=True)
    readings: list[EngineStats] = []

    def run(prompts: np.ndarray) -> Pass:
        ids = prompts.tolist()
        started = time.perf_counter()
        outputs = list(engine.generate(ids, params))
        wall = time.perf_counter() - started
        readings.append(engine.stats())
        ttft_ms = outputs[0].metrics.ttft_ms if len(outputs) == 1 else None
        tokens = [list(output.token_ids) for output in outputs]
        return Pass(wall_s=wall, ttft_s=None if ttft_ms is None else ttft_ms / 1e3, tokens=tokens)

    _, *passes = measure(run, work, runs)
    return passes, readings


def bytes_read_per_token(engine: NativeEngine, *, context: int) -> int:
    """Bytes that one decoding step of one request has to read: all weights but the embedding's table, and its cache.

    Of weights as the engine holds them, scales included. `context` is the mean length of the sequence.
    """
    stats, config = engine.stats(), engine.decoder.config
    # A tied output layer reads the table itself, unless the backend keeps a packed copy of it beside.
    tied = config.tie_word_embeddings and stats.backend != "cpu"
    table_bytes = 0 if tied else config.vocab_size * config.hidden_size * engine.decoder.dtype.itemsize
    blocks = engine.scheduler.blocks
    per_token = 0 if blocks is None else engine.scheduler.block_bytes / blocks.block_size
    return stats.weights_bytes - table_bytes + int(per_token * context)


if __name__ == "__main__":
    sys.exit(main())
