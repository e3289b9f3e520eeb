"""What serving costs: the engine's own throughput against the same work as streams over HTTP, in turn.

    python benchmarks/serve/overhead.py MODEL [--streams 32] [--rounds 5]

Both engines are in memory the whole time and only one works at a time. The client runs on the same cores and its
processor time counts against the server, which is what a user of one machine sees.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from typing import Any

from server_process import ServerProcess
from stream_client import Reply, send

from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams
from burnish.measure.hardware import hardware_record, version_record


def prompts_of(count: int, length: int, vocab_size: int) -> list[list[int]]:
    return [[(7 * i + 13 * j + 5) % (vocab_size - 10) + 5 for j in range(length)] for i in range(count)]


def direct(engine: NativeEngine, prompts: list[list[int]], output_tokens: int) -> float:
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
    started = time.perf_counter()
    tokens = sum(len(output.token_ids) for output in engine.generate(prompts, params))
    seconds = time.perf_counter() - started
    assert tokens == len(prompts) * output_tokens
    return tokens / seconds


async def served(port: int, model: str, prompts: list[list[int]], output_tokens: int) -> tuple[float, list[Reply]]:
    bodies: list[dict[str, Any]] = [
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for prompt in prompts
    ]
    started = time.perf_counter()
    replies = await asyncio.gather(*(send(port, "/v1/completions", body) for body in bodies))
    seconds = time.perf_counter() - started
    assert all(reply.status == 200 and reply.done for reply in replies)
    tokens = sum((reply.usage() or {})["completion_tokens"] for reply in replies)
    assert tokens == len(prompts) * output_tokens
    return tokens / seconds, replies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--input-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--stream-interval", default="20")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    options = ["--threads", str(given.threads), "--dtype", given.dtype, "--stream-interval", given.stream_interval]
    options += ["--concurrency", str(given.streams), "--speculation", "off", "--quiet"]
    server = ServerProcess(given.model, *options)
    engine = NativeEngine(
        given.model, threads=given.threads, dtype=given.dtype, max_num_seqs=given.streams, speculation="off"
    )
    engine.warm_up()
    prompts = prompts_of(given.streams, given.input_tokens, engine.decoder.config.vocab_size)
    rounds = []
    try:
        for number in range(given.rounds + 1):
            own = time.process_time()
            alone = direct(engine, prompts, given.output_tokens)
            direct_cpu_s = time.process_time() - own
            before = server.cpu_s()
            own = time.process_time()
            through, replies = asyncio.run(
                served(server.port, server.record["models"][0], prompts, given.output_tokens)
            )
            spent = {name: value - before[name] for name, value in server.cpu_s().items()}
            events = sum(len(reply.events()) for reply in replies)
            if number:  # the first round warms both
                rounds.append(
                    {
                        "direct_tokens_per_s": alone,
                        "served_tokens_per_s": through,
                        "ratio": through / alone,
                        "direct_cpu_s": direct_cpu_s,
                        "http_cpu_s": spent["http"],
                        "engine_cpu_s": spent["engine"],
                        "client_cpu_s": time.process_time() - own,
                        "events": events,
                        "load_1min": os.getloadavg()[0],
                    }
                )
    finally:
        server.stop()
    record = {
        "model": given.model,
        "streams": given.streams,
        "input_tokens": given.input_tokens,
        "output_tokens": given.output_tokens,
        "threads": given.threads,
        "dtype": engine.stats().dtype,
        "stream_interval_ms": float(given.stream_interval),
        "ratio_median": statistics.median(one["ratio"] for one in rounds),
        # Processor time is steadier than the clock on a machine that others use as well.
        "server_cpu_over_direct_median": statistics.median(
            (one["engine_cpu_s"] + one["http_cpu_s"]) / one["direct_cpu_s"] for one in rounds
        ),
        "rounds": rounds,
        "hardware": hardware_record(),
        "versions": version_record(),
    }
    if given.json:
        print(json.dumps(record, indent=2))
        return
    for one in rounds:
        print("  ".join(f"{name} {value:.4g}" for name, value in one.items()))
    print(f"served / direct, median of {len(rounds)}: {record['ratio_median']:.3f}")


if __name__ == "__main__":
    main()
