"""What RabbitMQ and MariaDB do for each item of the queue, without a model: the part of a cluster that workers share.

    python benchmarks/scale/server_rates.py --out benchmarks/results/DATE-queue-servers

Real workers, each a process, whose engine answers by the clock instead of computing: as fast as it can ("at once"), or
so many items a second, one at a time ("paced", as real engines finish). CPU time of the servers' processes, statements,
bytes and syncs come from the servers' own counters. `idle` is what workers cost that have nothing to do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
from collections import deque
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import psutil
import servers
import sqlalchemy as sql

from burnish.engine.outputs import RequestMetrics, RequestOutput
from burnish.measure.hardware import hardware_record, version_record
from burnish.scale.opening import QueueAddress, open_publisher, open_store, open_worker
from burnish.scale.store import JobStore
from burnish.scale.submit import submit_file

COUNTERS = ("Questions", "Com_commit", "Bytes_received", "Bytes_sent", "Innodb_os_log_written", "Innodb_data_fsyncs")
_PATIENCE_S = 300.0


class ClockEngine:
    """Ends one item every 1 / `rate` seconds, or with rate 0 all `slots` in each step; each answer is `text`."""

    def __init__(self, *, slots: int, rate: float, text: str) -> None:
        self.tokenizer = object()
        self._slots, self._rate, self._text = slots, rate, text
        self._waiting: deque[int] = deque()
        self._ids = itertools.count()
        self._next_s = 0.0

    def submit(self, prompt: Any, params: Any = None) -> int:
        number = next(self._ids)
        self._waiting.append(number)
        return number

    def abort(self, request_id: int) -> None:
        self._waiting.remove(request_id)

    def step(self) -> list[RequestOutput]:
        count = self._slots
        if self._rate:
            count = 1
            now_s = time.monotonic()
            self._next_s = max(self._next_s + 1 / self._rate, now_s)
            time.sleep(self._next_s - now_s)
        return [self._output(self._waiting.popleft()) for _ in range(min(count, len(self._waiting)))]

    def _output(self, number: int) -> RequestOutput:
        metrics = RequestMetrics(prompt_tokens=128, output_tokens=128, ttft_ms=1.0, tpot_ms=1.0, e2e_ms=129.0)
        return RequestOutput(
            index=number, prompt=None, text=self._text, token_ids=(1,), finish_reason="stop", metrics=metrics
        )


def run_worker(address: QueueAddress, options: dict[str, Any], until_empty: bool) -> None:
    """A process: one worker."""
    engine = ClockEngine(**options)
    with open_worker(
        address,
        lambda: engine,
        model="clock",
        slots=options["slots"],
        until_empty=until_empty,
        patience_s=_PATIENCE_S,
        start_patience_s=_PATIENCE_S,
    ) as worker:
        worker.run()


class Watch:
    """CPU seconds and counters of both servers since it began."""

    def __init__(self, broker: servers.RabbitMQ, database: servers.MariaDB, store: JobStore) -> None:
        self._trees = {"broker": broker.process, "database": database.process}
        self._store = store
        self._began = self._read()

    def so_far(self) -> dict[str, float]:
        now = self._read()
        return {name: now[name] - self._began[name] for name in now}

    def _read(self) -> dict[str, float]:
        found: dict[str, float] = {"seconds": time.monotonic()}
        for name, process in self._trees.items():
            assert process is not None
            parent = psutil.Process(process.pid)
            times = [each.cpu_times() for each in (parent, *parent.children(recursive=True))]
            found[f"{name}_cpu_s"] = sum(one.user + one.system for one in times)
        rows = self._store.database.read(lambda c: c.execute(sql.text("SHOW GLOBAL STATUS")).all())
        told = dict(rows)
        return found | {name: float(told[name]) for name in COUNTERS}


def measure(
    broker: servers.RabbitMQ,
    database: servers.MariaDB,
    *,
    name: str,
    items: int,
    workers: int,
    rate: float,
    prompt: str,
    answer: str,
    slots: int,
) -> dict[str, Any]:
    """One job through `workers` processes; figures for each item, from the first stored result to the last."""
    address = QueueAddress(store=database.url, broker=broker.url, queue=name)
    with open_store(address, patience_s=_PATIENCE_S) as store, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "p.jsonl"
        file.write_text("".join(json.dumps({"prompt": f"{number} {prompt}"}) + "\n" for number in range(items)))
        with open_publisher(address, patience_s=_PATIENCE_S) as sender:
            sender.depths()  # the queues are made, and settle
            watch = Watch(broker, database, store)
            submit_file(store, sender, file, source="p.jsonl", queue=name, params={"max_tokens": 128}, job_id=name)
            submitted = watch.so_far()
        context = multiprocessing.get_context("spawn")
        options = {"slots": slots, "rate": rate, "text": answer}
        crew = [context.Process(target=run_worker, args=(address, options, True)) for _ in range(workers)]
        for process in crew:
            process.start()
        while (left := store.depth(name).pending) == items:
            time.sleep(0.01)
        time.sleep(1.0)  # all have begun
        watch, first = Watch(broker, database, store), store.depth(name).unfinished
        while (left := store.depth(name).unfinished) > items // 20:
            time.sleep(0.05)
        used = watch.so_far()
        done = first - left
        connected = store.database.read(
            lambda c: c.execute(sql.text("SELECT count(*) FROM information_schema.processlist")).scalar_one()
        )
        for process in crew:
            process.join()
    return {
        "name": name,
        "workers": workers,
        "rate_per_worker": rate,
        "items": items,
        "items_per_s": done / used["seconds"],
        "per_item": {key: value / done for key, value in used.items() if key != "seconds"},
        "submitted_per_s": items / submitted["seconds"],
        "submitting_per_item": {key: value / items for key, value in submitted.items() if key != "seconds"},
        "database_connections": connected - 1,
    }


def idle(broker: servers.RabbitMQ, database: servers.MariaDB, *, workers: int, seconds: float) -> dict[str, Any]:
    """Workers with nothing to do: what each costs the servers in a second, and the connections it holds."""
    address = QueueAddress(store=database.url, broker=broker.url, queue="idle")
    with open_store(address, patience_s=_PATIENCE_S) as store, open_publisher(address, patience_s=_PATIENCE_S):
        assert broker.process is not None
        before = _memory(broker.process.pid)
        context = multiprocessing.get_context("spawn")
        options = {"slots": 32, "rate": 0.0, "text": ""}
        crew = [context.Process(target=run_worker, args=(address, options, False)) for _ in range(workers)]
        for process in crew:
            process.start()
        count = sql.text("SELECT count(*) FROM burnish_workers WHERE queue = 'idle' AND state = 'working'")
        while store.database.read(lambda c: c.execute(count).scalar_one()) < workers:
            time.sleep(0.2)
        time.sleep(6.0)
        watch = Watch(broker, database, store)
        time.sleep(seconds)
        used = watch.so_far()
        connected = store.database.read(
            lambda c: c.execute(sql.text("SELECT count(*) FROM information_schema.processlist")).scalar_one()
        )
        after = _memory(broker.process.pid)
        for process in crew:
            process.terminate()
            process.join()
    each = {key: value / used["seconds"] / workers for key, value in used.items() if key != "seconds"}
    return {
        "workers": workers,
        "seconds": used["seconds"],
        "per_worker_second": each,
        "database_connections": connected - 1,
        "broker_bytes_per_worker": (after - before) / workers,
    }


def _memory(pid: int) -> int:
    parent = psutil.Process(pid)
    return sum(each.memory_info().rss for each in (parent, *parent.children(recursive=True)))


def stored_bytes(database: servers.MariaDB, items: int) -> dict[str, float]:
    """Bytes of the tables with their indexes, over all items that went through."""
    with open_store(QueueAddress(store=database.url)) as store:
        for table in ("burnish_items", "burnish_results"):
            store.database.write(lambda c, table=table: c.execute(sql.text(f"ANALYZE TABLE {table}")).all())
        query = sql.text(
            "SELECT table_name, data_length + index_length FROM information_schema.tables "
            "WHERE table_name LIKE 'burnish%'"
        )
        rows = store.database.read(lambda c: c.execute(query).all())
    return {str(name): float(size) / items for name, size in rows if name in ("burnish_items", "burnish_results")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=6000, help="of each part")
    parser.add_argument("--workers", default="1,2,4,8", help="processes, of the parts that answer at once")
    parser.add_argument("--paced", default="8x20", help="WORKERSxRATE of the paced parts, joined by commas")
    parser.add_argument("--idle", type=int, default=16)
    parser.add_argument("--prompt-bytes", type=int, default=512)
    parser.add_argument("--answer-bytes", type=int, default=512)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    flags = parser.parse_args()
    broker = servers.RabbitMQ()
    try:
        database = servers.MariaDB()
        try:
            shape = {"prompt": "a" * flags.prompt_bytes, "answer": "b" * flags.answer_bytes, "slots": flags.slots}
            plans = [(f"at-once-{count}", int(count), 0.0) for count in flags.workers.split(",")]
            for each in flags.paced.split(","):
                count, rate = each.split("x")
                plans.append((f"paced-{each}", int(count), float(rate)))
            parts = []
            for name, count, rate in plans:
                parts.append(measure(broker, database, name=name, items=flags.items, workers=count, rate=rate, **shape))
                print(json.dumps(parts[-1]), flush=True)
            record = {
                "date": str(date.today()),
                "hardware": hardware_record(),
                "versions": version_record(),
                "servers": servers.versions("mariadb-server", "rabbitmq-server"),
                "prompt_bytes": flags.prompt_bytes,
                "answer_bytes": flags.answer_bytes,
                "slots": flags.slots,
                "parts": parts,
                "stored_bytes_per_item": stored_bytes(database, flags.items * len(parts)),
                "idle": idle(broker, database, workers=flags.idle, seconds=30.0),
                "load_1min": psutil.getloadavg()[0],
            }
        finally:
            database.close()
    finally:
        broker.close()
    print(table(record))
    if flags.out:
        Path(f"{flags.out}.json").write_text(json.dumps(record, indent=2) + "\n")
        Path(f"{flags.out}.md").write_text(table(record))
    return 0


def table(record: dict[str, Any]) -> str:
    """For people."""
    hardware, quiet = record["hardware"], record["idle"]
    lines = [
        f"# What the servers do for each item, {record['date']}",
        "",
        f"{hardware['cpu']}, {hardware['cores']} cores for servers and workers together (load average "
        f"{record['load_1min']:.1f} at the end); {record['servers']}. Prompts of {record['prompt_bytes']} and answers "
        f"of {record['answer_bytes']} bytes, {record['slots']} slots a worker, engines that only wait.",
        "",
        "| workers | items/s | broker CPU ms | database CPU ms | statements | commits | bytes to, from the database "
        "| log bytes, syncs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for part in record["parts"]:
        each = part["per_item"]
        pace = f"{part['workers']}, {part['rate_per_worker']:g} items/s each" if part["rate_per_worker"] else "at once"
        who = pace if part["rate_per_worker"] else f"{part['workers']}, {pace}"
        lines.append(_row(who, part["items_per_s"], each))
    first = record["parts"][0]
    lines.append(_row("submitting", first["submitted_per_s"], first["submitting_per_item"]))
    sizes = record["stored_bytes_per_item"]
    idle_each = quiet["per_worker_second"]
    lines += [
        "",
        "All but items/s are for one item. `submitting` is one process.",
        "",
        f"Stored for each item, indexes included: {sizes['burnish_items']:.0f} bytes of item, "
        f"{sizes['burnish_results']:.0f} of result.",
        "",
        f"{quiet['workers']} workers with nothing to do, each: {idle_each['Questions']:.2f} statements/s, "
        f"{idle_each['database_cpu_s'] * 1e3:.2f} ms database CPU and {idle_each['broker_cpu_s'] * 1e3:.2f} ms broker "
        f"CPU a second, {quiet['database_connections'] / quiet['workers']:.1f} connections to the database, "
        f"{quiet['broker_bytes_per_worker'] / 1024:.0f} KiB of the broker's memory.",
    ]
    return "\n".join(lines) + "\n"


def _row(who: str, rate: float, each: dict[str, float]) -> str:
    return (
        f"| {who} | {rate:.0f} | {each['broker_cpu_s'] * 1e3:.2f} | {each['database_cpu_s'] * 1e3:.2f} "
        f"| {each['Questions']:.1f} | {each['Com_commit']:.2f} "
        f"| {each['Bytes_received']:.0f}, {each['Bytes_sent']:.0f} "
        f"| {each['Innodb_os_log_written']:.0f}, {each['Innodb_data_fsyncs']:.2f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
