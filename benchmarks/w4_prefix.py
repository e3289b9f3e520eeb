"""W4: a system prompt of 512 tokens before 32 different questions, 64 tokens out; prefix caching on and off.

    python benchmarks/w4_prefix.py MODEL --quantize int8

The questions have 32 to 64 tokens; they come at once and run at most `--concurrency` at a time. Two engines, one with
and one without prefix caching, do the same requests in turn. Each pass has a system prompt of its own, so that every
pass begins with a cold cache and pays for those 512 tokens once.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

import numpy as np
from session import arguments, open_engine, random_ids, record_of, spread, table, tell

from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams


def main() -> int:
    parser = arguments(__doc__, runs=2)
    parser.add_argument("--concurrency", default="8,32", help="requests at a time; several are measured in turn")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--system-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    flags = parser.parse_args()
    counts = [int(part) for part in flags.concurrency.split(",")]
    longest = flags.system_tokens + 64 + flags.output_tokens + 1
    engines = {
        state: open_engine(flags, max_num_seqs=max(counts), max_model_len=longest, prefix_caching=state == "on")
        for state in ("on", "off")
    }
    results = {}
    for count in counts:
        walls: dict[str, list[float]] = {"on": [], "off": []}
        same, hits = 0, 0
        for turn in range(1 + flags.runs):
            prompts = _prompts(flags, engines["on"].decoder.config.vocab_size, seed=1000 * count + turn)
            answers = {}
            for state, engine in engines.items():
                before = engine.stats().prefix_hit_tokens
                wall, answers[state] = _run(engine, prompts, concurrency=count, output_tokens=flags.output_tokens)
                if turn:  # the first turn warms up
                    walls[state].append(wall)
                    hits += engine.stats().prefix_hit_tokens - before if state == "on" else 0
            same = sum(a == b for a, b in zip(answers["on"], answers["off"]))
        results[str(count)] = {
            "walls_on_s": [round(wall, 4) for wall in walls["on"]],
            "walls_off_s": [round(wall, 4) for wall in walls["off"]],
            "ratios": [round(off / on, 4) for on, off in zip(walls["on"], walls["off"])],
            "hit_tokens_per_pass": hits // flags.runs,
            "same_answers": same,
        }
    record = {
        **record_of("w4", flags, engines["on"].stats()),
        "requests": flags.requests,
        "system_tokens": flags.system_tokens,
        "output_tokens": flags.output_tokens,
        "by_concurrency": results,
        "ratio": {count: median(one["ratios"]) for count, one in results.items()},
    }
    rows = [["at a time", "on s", "off s", "ratio", "tokens not computed", "same answers"]]
    rows += [
        [
            count,
            spread(one["walls_on_s"], 2),
            spread(one["walls_off_s"], 2),
            spread(one["ratios"], 2),
            str(one["hit_tokens_per_pass"]),
            f"{one['same_answers']}/{flags.requests}",
        ]
        for count, one in results.items()
    ]
    tell(flags, record, table(rows))
    return 0


def _prompts(flags: argparse.Namespace, vocab_size: int, *, seed: int) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    system = random_ids(draw, flags.system_tokens, vocab_size)
    return [system + random_ids(draw, int(draw.integers(32, 65)), vocab_size) for _ in range(flags.requests)]


def _run(
    engine: NativeEngine, prompts: list[list[int]], *, concurrency: int, output_tokens: int
) -> tuple[float, list[tuple[int, ...]]]:
    engine.scheduler.max_num_seqs = concurrency
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    started = time.perf_counter()
    outputs = list(engine.generate(prompts, params))
    return time.perf_counter() - started, [output.token_ids for output in outputs]


if __name__ == "__main__":
    sys.exit(main())
