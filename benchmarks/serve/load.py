"""`burnish serve` under load: nothing lost, nothing wrong, nothing leaked; and four times as much as it can do.

    python benchmarks/serve/load.py MODEL [--seconds 180] [--clients 200]

1. Every prompt alone, at temperature 0: what the answers have to be.
2. `--clients` streaming clients for `--seconds`, each asking again as soon as it has its answer. At random moments 25
   of them close their connection in the middle; 10 more open a stream and never read from it.
3. 25 long streams alone; all close at once: how long until their slots and blocks are free.
4. What the server holds then, against what it held after step 1.
5. Peak goodput: as many clients as the server has places. Then requests arrive, at random, at four times that rate.

Goodput is tokens per second of answers that came with status 200, whole, and equal to the one from step 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from typing import Any

from server_process import ServerProcess
from stream_client import Reply, metrics, send

from burnish.measure.hardware import hardware_record, version_record

WORDS = "list count every customer order between city name older than total average price of products by month".split()
SETTLE_S = 30.0


def make_prompts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(4, 24))) for _ in range(count)]


class Load:
    """One server's clients, and what they saw."""

    def __init__(self, port: int, model: str, prompts: list[str], *, max_tokens: int) -> None:
        self.port = port
        self.model = model
        self.prompts = prompts
        self.max_tokens = max_tokens
        self.expected: dict[str, tuple[str, int]] = {}
        self.seen: Counter[str] = Counter()
        self.good_tokens = 0
        self.ttft_s: list[float] = []

    def body(self, prompt: str, **fields: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }

    async def ask(self, prompt: str, **options: Any) -> Reply:
        return await send(self.port, "/v1/chat/completions", self.body(prompt), **options)

    async def learn(self) -> None:
        for prompt in self.prompts:
            reply = await self.ask(prompt)
            assert reply.status == 200, reply
            assert reply.done, reply
            self.expected[prompt] = (reply.digest(), (reply.usage() or {})["completion_tokens"])

    def judge(self, prompt: str, reply: Reply) -> None:
        """Count what became of one request that nobody cut off."""
        if reply.status != 200:
            self.seen[f"status_{reply.status}"] += 1
        elif not reply.done:
            self.seen["lost"] += 1
        elif (reply.digest(), (reply.usage() or {}).get("completion_tokens")) != self.expected[prompt]:
            self.seen["wrong"] += 1
        else:
            self.seen["right"] += 1
            self.good_tokens += self.expected[prompt][1]
            if reply.first_s is not None:
                self.ttft_s.append(reply.first_s)

    async def client(self, until_s: float, draw: random.Random) -> None:
        while time.monotonic() < until_s:
            prompt = draw.choice(self.prompts)
            self.judge(prompt, await self.ask(prompt))

    async def leaver(self, at_s: float, draw: random.Random) -> float | None:
        """Close in the middle at some moment; returns seconds until the server has noticed."""
        await asyncio.sleep(max(0.0, at_s - time.monotonic()))
        left = await self.left_so_far()
        reply = await self.ask(draw.choice(self.prompts), leave_after_bytes=draw.randrange(300, 4000))
        if not reply.left:
            self.judge_early(reply)
            return None
        closed_s = time.monotonic()
        while time.monotonic() - closed_s < SETTLE_S:
            if await self.left_so_far() > left:
                return time.monotonic() - closed_s
            await asyncio.sleep(0.02)
        return SETTLE_S

    def judge_early(self, reply: Reply) -> None:
        self.seen["leaver_not_streaming" if reply.status != 200 else "leaver_ended_first"] += 1

    async def left_so_far(self) -> float:
        page = await metrics(self.port)
        return sum(
            value for name, value in page.items() if name.startswith("burnish_requests_total") and "gone" in name
        )

    async def staller(self, seconds: float, prompt: str) -> None:
        """Ask for much and read nothing."""
        body = self.body(prompt, max_tokens=600, n=8, logprobs=True, top_logprobs=20)
        await send(self.port, "/v1/chat/completions", body, stall_s=seconds)


async def steady(load: Load, given: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(given.seed)
    begun_s = time.monotonic()
    until_s = begun_s + given.seconds
    clients = [load.client(until_s, random.Random(draw.random())) for _ in range(given.clients)]
    times = sorted(begun_s + draw.uniform(0.1, 0.9) * given.seconds for _ in range(given.leavers))
    leavers = [load.leaver(at_s, random.Random(draw.random())) for at_s in times]
    stallers = [load.staller(given.seconds * 0.9, load.prompts[i]) for i in range(given.stallers)]
    results = await asyncio.gather(*stallers, *leavers, *clients)
    freed = [seconds for seconds in results[len(stallers) : len(stallers) + len(leavers)] if seconds is not None]
    seconds = time.monotonic() - begun_s
    ttft_ms = sorted(1e3 * one for one in load.ttft_s)
    return {
        "seconds": seconds,
        "clients": given.clients,
        **{name: load.seen[name] for name in ("right", "wrong", "lost")},
        "other": {name: count for name, count in load.seen.items() if name not in ("right", "wrong", "lost")},
        "left_in_the_middle": len(freed),
        "noticed_s_max": max(freed, default=None),
        "stalled_readers": given.stallers,
        "tokens_per_s": load.good_tokens / seconds,
        "ttft_ms_p50": ttft_ms[len(ttft_ms) // 2] if ttft_ms else None,
        "ttft_ms_p99": ttft_ms[int(len(ttft_ms) * 0.99)] if ttft_ms else None,
    }


async def all_leave(load: Load, count: int) -> dict[str, Any]:
    """Seconds until nothing is held any more after `count` long streams are closed at once."""
    body = load.body(load.prompts[0], max_tokens=900, temperature=1)
    streams = [send(load.port, "/v1/chat/completions", body, leave_after_bytes=2000) for _ in range(count)]
    before = await metrics(load.port)
    replies = await asyncio.gather(*streams)
    closed_s = time.monotonic()
    while time.monotonic() - closed_s < SETTLE_S:
        page = await metrics(load.port)
        # The engine's readings are of its last step; those of before the streams would say that nothing is held.
        fresh = page["burnish_engine_output_tokens_total"] > before["burnish_engine_output_tokens_total"]
        if fresh and not any(
            page[name] for name in ("burnish_admitted_answers", "burnish_running_answers", "burnish_kv_blocks_used")
        ):
            break
        await asyncio.sleep(0.02)
    return {
        "streams": sum(reply.left for reply in replies),
        "free_after_s": time.monotonic() - closed_s,
        "tokens_not_computed": count * 900
        - int(page["burnish_engine_output_tokens_total"] - before["burnish_engine_output_tokens_total"]),
    }


async def settled(load: Load) -> dict[str, float]:
    """The server's readings once nothing runs any more."""
    until_s = time.monotonic() + SETTLE_S
    while True:
        page = await metrics(load.port)
        if time.monotonic() > until_s or not page["burnish_admitted_answers"] + page["burnish_kv_blocks_used"]:
            return page
        await asyncio.sleep(0.1)


async def peak(load: Load, given: argparse.Namespace) -> dict[str, Any]:
    begun_s = time.monotonic()
    draw = random.Random(given.seed + 1)
    until_s = begun_s + given.overload_seconds
    await asyncio.gather(*(load.client(until_s, random.Random(draw.random())) for _ in range(2 * given.concurrency)))
    seconds = time.monotonic() - begun_s
    return {
        "seconds": seconds,
        "clients": 2 * given.concurrency,
        "goodput_tokens_per_s": load.good_tokens / seconds,
        "answers_per_s": load.seen["right"] / seconds,
        "seen": dict(load.seen),
    }


async def overload(load: Load, given: argparse.Namespace, rate: float) -> dict[str, Any]:
    """Requests come at `rate` per second whatever becomes of them."""
    draw = random.Random(given.seed + 2)
    begun_s = time.monotonic()
    due_s, late_s, tasks = begun_s, 0.0, []

    async def one(prompt: str) -> None:
        load.judge(prompt, await load.ask(prompt))

    while due_s < begun_s + given.overload_seconds:
        due_s += draw.expovariate(rate)
        # A client that was held up does not make up for it with a burst that nobody ordered.
        late_s += max(0.0, time.monotonic() - due_s - 1)
        due_s = max(due_s, time.monotonic() - 1)
        await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        tasks.append(asyncio.create_task(one(draw.choice(load.prompts))))
    tokens = load.good_tokens
    seconds = time.monotonic() - begun_s
    await asyncio.gather(*tasks)
    return {
        "seconds": seconds,
        "asked_per_s": len(tasks) / seconds,
        "client_held_up_s": late_s,
        "goodput_tokens_per_s": tokens / seconds,
        "seen": dict(load.seen),
    }


async def run(given: argparse.Namespace, server: ServerProcess) -> dict[str, Any]:
    prompts = make_prompts(given.prompts, given.seed)
    model = server.record["models"][0]

    def fresh() -> Load:
        load = Load(server.port, model, prompts, max_tokens=given.max_tokens)
        load.expected = expected
        return load

    expected: dict[str, tuple[str, int]] = {}
    first = fresh()
    await first.learn()
    await asyncio.gather(*(first.client(time.monotonic() + 3, random.Random(i)) for i in range(given.concurrency)))
    await settled(first)
    await asyncio.sleep(1)
    held_before = server.held()
    record: dict[str, Any] = {"steady": await steady(fresh(), given)}
    record["all_leave"] = await all_leave(fresh(), given.leavers)
    page = await settled(first)
    await asyncio.sleep(2)
    held = server.held()
    record["leaked"] = {
        "blocks": page["burnish_kv_blocks_used"],
        "answers": page["burnish_admitted_answers"],
        **{name: held[name] - held_before[name] for name in ("descriptors", "threads", "children")},
    }
    record["memory_mib"] = {"before": held_before["rss_bytes"] / 2**20, "after": held["rss_bytes"] / 2**20}
    cut = 'burnish_cut_connections_total{reason="slow_reader"}'
    record["slow_readers_cut"] = page.get(cut, 0.0)
    record["peak"] = await peak(fresh(), given)
    rate = 4 * record["peak"]["answers_per_s"]
    record["overload"] = await overload(fresh(), given, rate)
    record["overload"]["share_of_peak"] = (
        record["overload"]["goodput_tokens_per_s"] / record["peak"]["goodput_tokens_per_s"]
    )
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="burnish-sql-base")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--overload-seconds", type=float, default=40)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--leavers", type=int, default=25)
    parser.add_argument("--stallers", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    options = ["--concurrency", str(given.concurrency), "--threads", str(given.threads)]
    # Room for every client of the steady part, the readers that stall and their eight answers each.
    options += ["--max-queue", str(given.clients + given.leavers + 8 * given.stallers), "--slow-reader", "5"]
    server = ServerProcess(given.model, *options)
    try:
        load_before = os.getloadavg()[0]
        record = asyncio.run(run(given, server))
    finally:
        code = server.stop()
    record = {
        "model": given.model,
        "settings": vars(given),
        **record,
        "exit_code": code,
        "load_1min_before": load_before,
        "hardware": hardware_record(),
        "versions": version_record(),
    }
    json.dump(record, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
