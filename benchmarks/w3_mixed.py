"""W3: requests of mixed lengths (16 to 512 tokens in, 16 to 512 out) that arrive one by one, at random.

    python benchmarks/w3_mixed.py MODEL --quantize int8

Capacity is W1's rate (tokens in and out per second), measured first on the same engine. Then the same requests arrive
twice, as Poisson processes: at 80 % of capacity, which shows latencies, and at twice the capacity, which shows the rate
that the engine reaches when it always has work. At 80 % no system can finish more than those 80 % per second, so W3's
rate is held against W1's where the queue never runs dry.

    all         tokens in and out of all requests / (last token - first arrival): ramp and drain included
    kept        the same of the requests that kept the limits on TTFT and TPOT: goodput
    when full   tokens between the moment all places are taken and the moment the last waiting request got one;
                a prompt counts when its first token is there

TTFT counts from the arrival that was drawn, not from when the engine took notice.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from peers.work import WORKS, Work
from session import arguments, open_engine, percent, random_ids, record_of, table, tell
from w1_w2 import run_passes

from burnish.engine.native import NativeEngine
from burnish.engine.outputs import RequestOutput
from burnish.engine.sampling import SamplingParams
from burnish.measure.intervals import percentiles

SLOTS = 32


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request: its prompt, the length of its answer, and when it comes, in seconds from the start."""

    prompt: list[int]
    output_tokens: int
    at_s: float


@dataclass(frozen=True, kw_only=True)
class Served:
    """A finished request; `begun_s` is when the engine took it."""

    arrival: Arrival
    begun_s: float
    output: RequestOutput

    @property
    def ttft_ms(self) -> float:
        return (self.begun_s - self.arrival.at_s) * 1e3 + (self.output.metrics.ttft_ms or 0.0)

    @property
    def tokens(self) -> int:
        return self.output.metrics.prompt_tokens + self.output.metrics.output_tokens

    def token_times_s(self) -> list[float]:
        gaps_s = [self.begun_s + (self.output.metrics.ttft_ms or 0.0) / 1e3]
        gaps_s += [gap / 1e3 for gap in self.output.metrics.itl_ms]
        return np.cumsum(gaps_s).tolist()


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one series of arrivals came to; `full_s` is the stretch in which places were taken and requests waited."""

    served: list[Served]
    full_s: tuple[float, float] | None


def main() -> int:
    parser = arguments(__doc__, runs=1)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--shortest", type=int, default=16)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--lengths", choices=("log-uniform", "uniform"), default="log-uniform")
    parser.add_argument("--load", type=float, default=0.8, help="share of capacity that arrives")
    parser.add_argument("--overload", type=float, default=2.0, help="the same, of the run that fills the engine")
    parser.add_argument("--slo-ttft-ms", type=float, default=2000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=200.0, help="5 tokens/s, about as fast as people read")
    parser.add_argument("--w1-output-tokens", type=int, default=128, help="other lengths of W1, to try it out")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()

    w1 = WORKS["w1"]
    w1 = Work(w1.name, w1.requests, w1.input_tokens, flags.w1_output_tokens)
    engine = open_engine(flags, max_num_seqs=SLOTS, max_model_len=max(2 * flags.longest, 257) + 1)
    passes, _ = run_passes(engine, w1, flags.runs)
    capacity = median(w1.requests * (w1.input_tokens + w1.output_tokens) / done.wall_s for done in passes)

    loads = {}
    for name, share in (("offered", flags.load), ("overload", flags.overload)):
        arrivals = draw_arrivals(flags, engine.decoder.config.vocab_size, tokens_per_s=share * capacity)
        loads[name] = {"share_of_capacity": share, **_figures(serve(engine, arrivals), flags, capacity=capacity)}
    record = {
        **record_of("w3", flags, engine.stats()),
        "requests": flags.requests,
        "lengths": f"{flags.lengths} {flags.shortest} to {flags.longest}",
        "seed": flags.seed,
        "slots": SLOTS,
        "slo": {"ttft_ms": flags.slo_ttft_ms, "tpot_ms": flags.slo_tpot_ms},
        "w1_tokens_per_s": round(capacity, 2),
        **loads,
    }
    tell(flags, record, _shown(record))
    return 0


def draw_arrivals(flags: argparse.Namespace, vocab_size: int, *, tokens_per_s: float) -> list[Arrival]:
    """The seed's requests; only the times between them depend on the rate."""
    draw = np.random.default_rng(flags.seed)
    size = (flags.requests, 2)
    if flags.lengths == "uniform":
        lengths = draw.integers(flags.shortest, flags.longest + 1, size=size)
    else:
        lengths = np.exp(draw.uniform(np.log(flags.shortest), np.log(flags.longest), size=size)).round().astype(int)
    gaps = draw.exponential(size=flags.requests) * lengths.sum(axis=1).mean() / tokens_per_s
    times = np.cumsum(gaps) - gaps[0]
    return [
        Arrival(prompt=random_ids(draw, tokens_in, vocab_size), output_tokens=tokens_out, at_s=at)
        for (tokens_in, tokens_out), at in zip(lengths.tolist(), times.tolist())
    ]


def serve(engine: NativeEngine, arrivals: list[Arrival]) -> Run:
    """Hand every request to the engine when its time has come, and step until all are done."""
    coming = deque(arrivals)
    taken: dict[int, tuple[Arrival, float]] = {}
    served: list[Served] = []
    full: list[float] = []
    started = time.perf_counter()
    while len(served) < len(arrivals):
        while coming and coming[0].at_s <= time.perf_counter() - started:
            arrival = coming.popleft()
            params = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)
            begun_s = time.perf_counter() - started
            taken[engine.submit(arrival.prompt, params)] = (arrival, begun_s)
        if engine.scheduler.idle:
            time.sleep(max(0.0, coming[0].at_s - (time.perf_counter() - started)))
            continue
        for output in engine.step():
            arrival, begun_s = taken.pop(output.index)
            served.append(Served(arrival=arrival, begun_s=begun_s, output=output))
        if engine.scheduler.waiting and len(engine.scheduler.running) == engine.scheduler.max_num_seqs:
            full.append(time.perf_counter() - started)
    return Run(served=served, full_s=(full[0], full[-1]) if len(full) > 1 else None)


def _figures(run: Run, flags: argparse.Namespace, *, capacity: float) -> dict[str, Any]:
    served = run.served
    arrivals_s = [one.arrival.at_s for one in served]
    span_s = max(one.token_times_s()[-1] for one in served) - min(arrivals_s)
    offered = sum(one.tokens for one in served) / (max(arrivals_s) - min(arrivals_s) or 1.0)
    kept = [
        one
        for one in served
        if one.ttft_ms <= flags.slo_ttft_ms and (one.output.metrics.tpot_ms or 0.0) <= flags.slo_tpot_ms
    ]
    rates = {
        "all": sum(one.tokens for one in served) / span_s,
        "kept": sum(one.tokens for one in kept) / span_s,
        "when_full": _rate_within(served, *run.full_s) if run.full_s else None,
    }
    return {
        "span_s": round(span_s, 3),
        "full_s": None if run.full_s is None else [round(edge, 3) for edge in run.full_s],
        # Of the times that were drawn: over few requests it differs from the rate asked for.
        "arrived_tokens_per_s": round(offered, 2),
        "tokens_per_s": {name: None if rate is None else round(rate, 2) for name, rate in rates.items()},
        "share_of_w1": {name: None if rate is None else round(rate / capacity, 4) for name, rate in rates.items()},
        "kept_requests": len(kept),
        "ttft_ms": percentiles([one.ttft_ms for one in served]),
        "tpot_ms": percentiles([one.output.metrics.tpot_ms for one in served if one.output.metrics.tpot_ms]),
    }


def _rate_within(served: list[Served], begin_s: float, end_s: float) -> float:
    tokens = 0
    for one in served:
        times_s = one.token_times_s()
        tokens += one.output.metrics.prompt_tokens if begin_s < times_s[0] <= end_s else 0
        tokens += sum(begin_s < at <= end_s for at in times_s)
    return tokens / (end_s - begin_s)


def _shown(record: dict[str, Any]) -> str:
    loads = [record["offered"], record["overload"]]
    rows = [["figure", *(f"{100 * load['share_of_capacity']:.0f} % of W1 offered" for load in loads)]]
    rows.append(["arrived tokens/s", *(f"{load['arrived_tokens_per_s']:.0f}" for load in loads)])
    for name, heading in (("all", "all"), ("kept", "kept (goodput)"), ("when_full", "when full")):
        cells = []
        for load in loads:
            rate, share = load["tokens_per_s"][name], load["share_of_w1"][name]
            cells.append("-" if rate is None else f"{rate:.0f} ({percent(share, 0)} of W1)")
        rows.append([f"tokens/s, {heading}", *cells])
    rows.append(["requests kept", *(f"{load['kept_requests']} of {record['requests']}" for load in loads)])
    for figure in ("ttft_ms", "tpot_ms"):
        cells = [" / ".join(f"{load[figure][mark]:.0f}" for mark in ("p50", "p90", "p99")) for load in loads]
        rows.append([f"{figure[:4].upper()} ms p50 / p90 / p99", *cells])
    slo = record["slo"]
    return (
        f"W1 {record['w1_tokens_per_s']:.0f} tokens/s; {record['requests']} requests, {record['lengths']} tokens; "
        f"kept: TTFT at most {slo['ttft_ms']:.0f} ms and TPOT at most {slo['tpot_ms']:.0f} ms\n\n{table(rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
