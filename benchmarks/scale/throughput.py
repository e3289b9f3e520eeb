"""What the queue costs: answers per second through it, beside the engine's own on the same prompts, in turn.

    python benchmarks/scale/throughput.py                                  # bundled model; SQLite, RabbitMQ + MariaDB
    python benchmarks/scale/throughput.py MODEL --prompts 64 --stores sqlite --workers 1,2

A round runs the engine on the whole list, then each kind of queue with the same engine and the same list; the figure
kept is the median over rounds of queue / engine. Submitting is timed apart; the queue's time ends when the last result
is stored. With --workers, processes share one queue of the first kind, timed from when each has stored one to the last.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import servers
import sqlalchemy as sql

from burnish.data.bundled import bundled_path
from burnish.engine.native import NativeEngine
from burnish.engine.sampling import SamplingParams
from burnish.measure.hardware import hardware_record, version_record
from burnish.scale.opening import QueueAddress, open_publisher, open_store, open_worker
from burnish.scale.reading import read_results
from burnish.scale.submit import submit_file
from burnish.scale.tables import results

BUNDLED = "burnish-sql-base"


def prompts(count: int) -> list[str]:
    words = "table city name age count order group salary team year list show where max from select by and".split()
    draw = random.Random(3)
    return [f"{number}: " + " ".join(draw.choices(words, k=draw.randint(20, 60))) for number in range(count)]


def batch_s(engine: NativeEngine, texts: list[str], params: dict[str, Any]) -> tuple[float, float, list[str]]:
    """Seconds of the engine alone, CPU seconds of this process, and the answers."""
    started, cpu = time.perf_counter(), time.process_time()
    answers = [output.text for output in engine.generate(texts, SamplingParams(**params))]
    return time.perf_counter() - started, time.process_time() - cpu, answers


def queue_s(
    engine: NativeEngine, address: QueueAddress, texts: list[str], params: dict[str, Any], slots: int
) -> tuple[float, float, float, list[str]]:
    """Seconds until the last result was stored, CPU seconds of this process, seconds of submitting, and the answers."""
    last = [0.0]
    job, submit_seconds = submit(address, texts, params)
    with open_worker(
        address,
        lambda: engine,
        model="benchmark",
        slots=slots,
        until_empty=True,
        progress=lambda count: last.__setitem__(0, time.perf_counter()),
    ) as worker:
        started, cpu = time.perf_counter(), time.process_time()
        worker.run()
        cpu_seconds = time.process_time() - cpu
    with open_store(address) as store:
        answers = [row["text"] for row in read_results(store.database, job)]
    return last[0] - started, cpu_seconds, submit_seconds, answers


def submit(address: QueueAddress, texts: list[str], params: dict[str, Any]) -> tuple[str, float]:
    with tempfile.TemporaryDirectory() as folder, open_store(address) as store, open_publisher(address) as publisher:
        file = Path(folder) / "p.jsonl"
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        started = time.perf_counter()
        made = submit_file(store, publisher, file, source="p.jsonl", queue=address.queue, params=params)
        return made.job_id, time.perf_counter() - started


def workers_s(
    address: QueueAddress, flags: argparse.Namespace, texts: list[str], params: dict[str, Any], count: int
) -> float:
    """Answers per second of `count` worker processes of one thread, from when each has stored one to the last."""
    job, _ = submit(address, texts, params)
    where = ["--store", address.store, *(["--broker", address.broker] if address.broker else [])]
    options = ["--until-empty", "--concurrency", str(flags.slots), "--threads", "1", "--quiet"]
    options += ["--queue", address.queue, "--quantize", flags.quantize, "--dtype", flags.dtype]
    command = [sys.executable, "-m", "burnish", "queue", "work", flags.model, *where, *options]
    processes = [subprocess.Popen(command) for _ in range(count)]
    by_worker = sql.select(sql.func.count(), sql.func.count(results.c.worker.distinct())).where(results.c.job_id == job)
    first: tuple[float, int] | None = None
    with open_store(address) as store:
        while True:
            done, begun = store.database.read(lambda connection: connection.execute(by_worker).one())
            now_s = time.perf_counter()
            if first is None and begun == count:
                first = (now_s, done)
            if done == len(texts):
                break
            if all(process.poll() is not None for process in processes):
                raise SystemExit("the workers ended before all was done")
            time.sleep(0.02)
    for process in processes:
        process.wait()
    if first is None or first[1] == done:
        raise SystemExit("not every worker had something to do: give more --prompts")
    return (done - first[1]) / (now_s - first[0])


@contextmanager
def queues(names: list[str]) -> Iterator[dict[str, QueueAddress]]:
    """The kinds of queue that were asked for, over servers of their own."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        made = {}
        for name in names:
            if name == "sqlite":
                made[name] = QueueAddress(store=f"sqlite:///{folder}/queue.db")
            elif name == "rabbitmq+mariadb":
                broker, database = servers.RabbitMQ(), servers.MariaDB()
                stack.callback(broker.close)
                stack.callback(database.close)
                made[name] = QueueAddress(store=database.url, broker=broker.url)
            else:
                raise SystemExit(f"unknown kind of queue: {name}")
        yield made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(bundled_path(BUNDLED)))
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--stores", default="sqlite,rabbitmq+mariadb")
    parser.add_argument("--workers", help="numbers of worker processes, such as 1,2")
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    flags = parser.parse_args()
    texts, params = prompts(flags.prompts), {"max_tokens": flags.max_tokens, "ignore_eos": True}
    engine = NativeEngine(
        flags.model,
        max_num_seqs=flags.slots,
        threads=flags.threads,
        quantize=flags.quantize,
        dtype=flags.dtype,
        prefix_caching=False,  # or whoever comes second would find the prompts computed
    )
    engine.warm_up()
    batch_s(engine, texts[: flags.slots * 2], params)
    rounds: list[dict[str, Any]] = []
    processes: dict[str, float] = {}
    with queues(flags.stores.split(",")) as addresses:
        for number in range(flags.rounds):
            seconds, cpu, answers = batch_s(engine, texts, params)
            found: dict[str, Any] = {"engine_per_s": len(texts) / seconds}
            for name, address in addresses.items():
                through, through_cpu, submitting, same = queue_s(engine, address, texts, params, flags.slots)
                assert same == answers, f"{name} answered otherwise"
                found[name] = {
                    "per_s": len(texts) / through,
                    "ratio": seconds / through,
                    "cpu_ratio": cpu / through_cpu,
                    "cpu_s": [cpu, through_cpu],
                    "submitted_per_s": len(texts) / submitting,
                }
            rounds.append(found)
            print(f"round {number + 1}: {json.dumps(found)}", flush=True)
        for count in [int(part) for part in flags.workers.split(",")] if flags.workers else []:
            address = next(iter(addresses.values()))
            processes[str(count)] = workers_s(address, flags, texts, params, count)
            print(f"{count} workers: {processes[str(count)]:.2f} answers/s", flush=True)
    stats = engine.stats()
    record = {
        "date": str(date.today()),
        "hardware": hardware_record(),
        "versions": version_record(),
        "model": Path(flags.model).name,
        "dtype": stats.dtype,
        "quantize": flags.quantize,
        "backend": stats.backend,
        "threads": flags.threads,
        "prompts": flags.prompts,
        "prompt_tokens": sum(len(engine.tokenizer.encode_prompt(text)) for text in texts),
        "max_tokens": flags.max_tokens,
        "slots": flags.slots,
        "rounds": rounds,
        "engine_per_s": median(found["engine_per_s"] for found in rounds),
        "queues": {
            name: {
                key: median(found[name][key] for found in rounds)
                for key in ("per_s", "ratio", "cpu_ratio", "submitted_per_s")
            }
            | {"ratios": [round(found[name]["ratio"], 4) for found in rounds]}
            for name in flags.stores.split(",")
        },
        "worker_processes_per_s": processes,
    }
    print(table(record))
    if flags.out:
        Path(f"{flags.out}.json").write_text(json.dumps(record, indent=2) + "\n")
        Path(f"{flags.out}.md").write_text(table(record))
    return 0


def table(record: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"# The queue beside the engine alone, {record['date']}",
        "",
        f"{record['model']} ({record['dtype']}, quantize {record['quantize']}, {record['backend']} backend, "
        f"{record['threads']} thread(s)), {record['prompts']} prompts with {record['prompt_tokens']} tokens together, "
        f"{record['max_tokens']} tokens each, {record['slots']} at once; "
        f"{len(record['rounds'])} rounds in turn, median.",
        "",
        "Engine's CPU time is that of this process, engine alone / with the queue; servers' own is not in it.",
        "",
        "| | answers/s | queue / engine | all rounds | CPU time, engine / queue | submitted/s |",
        "|---|---|---|---|---|---|",
        f"| engine alone | {record['engine_per_s']:.1f} | | | | |",
    ]
    for name, found in record["queues"].items():
        rounds = ", ".join(f"{ratio:.3f}" for ratio in found["ratios"])
        lines.append(
            f"| {name} | {found['per_s']:.1f} | {found['ratio']:.3f} | {rounds} | {found['cpu_ratio']:.3f} "
            f"| {found['submitted_per_s']:.0f} |"
        )
    if record["worker_processes_per_s"]:
        lines += ["", "Worker processes of one thread each over one queue, answers/s:", ""]
        lines += [f"- {count}: {value:.2f}" for count, value in record["worker_processes_per_s"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
