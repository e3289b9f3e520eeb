"""Everything that may die dies, again and again, and every prompt still gets exactly one right answer.

    python benchmarks/scale/chaos.py --out benchmarks/results/DATE-queue-chaos        # some minutes
    python benchmarks/scale/chaos.py --jobs 200 --kills 2                             # smaller

Workers are ended by SIGKILL at each of four points, as often as --kills says: items received, generating, results
committed but not acknowledged, acknowledged. The broker (RabbitMQ) and the database (MariaDB) are killed and started
again. One prompt kills whoever runs it. Answers are held against those of one engine that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import chaos_worker
import servers
import sqlalchemy as sql
from chaos_worker import POINTS, POISON, Fault

from burnish.data.bundled import bundled_path
from burnish.measure.hardware import hardware_record, version_record
from burnish.scale.items import Key
from burnish.scale.opening import QueueAddress, open_publisher, open_store
from burnish.scale.rabbit_consumer import RabbitConsumer
from burnish.scale.reading import read_results
from burnish.scale.store import JobStore
from burnish.scale.submit import submit_file
from burnish.scale.tables import DEAD, items, results

MODEL = "burnish-sql-base"
PATIENCE_S = 300.0
# A worker dies when it comes to its point for the 1st to so-manieth time: batches received, steps, batches stored.
LATEST = {"received": 4, "generating": 60, "committed": 6, "acked": 6}


def prompts(count: int) -> list[str]:
    """Prompts of different lengths, seeded."""
    words = ["table", "city", "name", "age", "count", "order", "group", "salary", "team", "year", "list", "show"]
    draw = random.Random(7)
    return [f"{number}: " + " ".join(draw.choices(words, k=draw.randint(2, 30))) for number in range(count)]


def undisturbed(texts: list[str], max_tokens: int) -> list[str]:
    """The answers of one engine in one process."""
    from burnish.engine.native import NativeEngine
    from burnish.engine.sampling import SamplingParams

    engine = NativeEngine(str(bundled_path(MODEL)), max_num_seqs=8, threads=1, dtype="float32", speculation="off")
    return [output.text for output in engine.generate(texts, SamplingParams(max_tokens=max_tokens))]


class Fleet:
    """`count` worker processes; whenever one dies the next begins, with the next fault of the plan."""

    def __init__(self, address: QueueAddress, faults: list[Fault], *, count: int, slots: int) -> None:
        self._address, self._faults, self._slots = address, faults, slots
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["chaos_worker"])
        self._count = count
        self._alive: dict[Any, Fault | None] = {}
        self._stopping = threading.Event()
        self.deaths: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._look_after, daemon=True)
        self._thread.start()

    @property
    def planned(self) -> int:
        """Faults that are still to come."""
        return len(self._faults) + sum(fault is not None for fault in self._alive.values())

    def stop(self) -> None:
        """Drain all workers."""
        self._stopping.set()
        self._thread.join()
        for process in self._alive:
            process.terminate()
        for process in self._alive:
            process.join(60)
            if process.is_alive():
                process.kill()
                self.deaths["would not end"] += 1

    def _look_after(self) -> None:
        while not self._stopping.wait(0.05):
            for process, fault in list(self._alive.items()):
                if not process.is_alive():
                    del self._alive[process]
                    killed = process.exitcode == -9
                    # A planned death, one of the poison before the plan was reached, or a fault of ours.
                    point = "other" if not killed else fault.point if fault else "poison"
                    self.deaths[point] += 1
                    if point == "other":
                        print(f"a worker ended with {process.exitcode}", flush=True)
            while len(self._alive) < self._count:
                fault = self._faults.pop(0) if self._faults else None
                process = self._context.Process(
                    target=chaos_worker.run_worker,
                    args=(self._address,),
                    kwargs={"model": str(bundled_path(MODEL)), "slots": self._slots, "fault": fault},
                )
                process.start()
                self._alive[process] = fault


def run_chaos(
    *,
    jobs: int,
    kills: int,
    broker_restarts: int,
    database_restarts: int,
    workers: int = 2,
    slots: int = 8,
    max_tokens: int = 24,
    seed: int = 0,
    limit_s: float = 1800.0,
    running: tuple[servers.RabbitMQ, servers.MariaDB] | None = None,
    say: Any = lambda text: None,
) -> dict[str, Any]:
    """Run it; returns what was lost, doubled or wrong (each ought to be 0), and what happened.

    Args:
        running: servers to use and to kill; fresh ones are started when not given.
    """
    draw = random.Random(seed)
    texts = prompts(jobs)
    poison = jobs // 3
    texts[poison] = POISON
    say("answers of an undisturbed engine")
    expected = undisturbed([text for text in texts if text != POISON], max_tokens)
    expected.insert(poison, "")
    faults = [Fault(point=point, count=draw.randint(1, LATEST[point])) for point in POINTS for _ in range(kills)]
    draw.shuffle(faults)
    with nullcontext(running) if running else _started() as (broker, database), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": text, "id": f"r{n}"}) + "\n" for n, text in enumerate(texts)))
        address = QueueAddress(store=database.url, broker=broker.url, queue="chaos")
        began = time.monotonic()
        with open_store(address, patience_s=PATIENCE_S) as store:
            with open_publisher(address, patience_s=PATIENCE_S) as sender, _killing_once(broker) as (begin, killed):
                made = submit_file(
                    store,
                    sender,
                    file,
                    source="chaos",
                    queue="chaos",
                    params={"max_tokens": max_tokens},
                    job_id="chaos",
                    progress=lambda *_: begin.set(),
                )
            say(f"submitted {made.published} items, the broker was killed {len(killed)} times meanwhile")
            fleet = Fleet(address, faults, count=workers, slots=slots)
            try:
                restarts = _restart_meanwhile(
                    store, fleet, broker, database, jobs, broker_restarts - len(killed), database_restarts, limit_s, say
                )
            finally:
                fleet.stop()
            restarts["broker"] += len(killed)
            seconds = time.monotonic() - began
            record = judge(store, expected, poison)
            with open_publisher(address, patience_s=PATIENCE_S) as sender:
                record["messages_left"] = sender.depths()
        record["deaths"] = dict(fleet.deaths)
        record["restarts"] = restarts
        record["seconds"] = round(seconds, 1)
        say("confirmed messages, with the broker killed meanwhile")
        record["publisher"] = publisher_check(broker, count=jobs)
    return record


def judge(store: JobStore, expected: list[str], poison: int) -> dict[str, Any]:
    """What is in the result store, held against what ought to be."""
    rows = {row["item"]: row for row in read_results(store.database, "chaos")}
    query = (
        sql.select(results.c.item_id, sql.func.count()).where(results.c.job_id == "chaos").group_by(results.c.item_id)
    )
    stored = store.database.read(lambda connection: connection.execute(query).all())
    attempts = (
        sql.select(items.c.attempts, sql.func.count()).where(items.c.job_id == "chaos").group_by(items.c.attempts)
    )
    dead = [row["item"] for row in read_results(store.database, "chaos", states=(DEAD,))]
    good = [number for number in range(len(expected)) if number != poison]
    return {
        "jobs": len(expected),
        "lost": sum(number not in rows for number in range(len(expected))),
        "duplicated": sum(count > 1 for _, count in stored),
        "wrong": sum(rows[number]["text"] != expected[number] for number in good if number in rows),
        "errors": sum(rows[number]["error"] is not None for number in good if number in rows),
        "dead": dead,
        "poison": poison,
        "attempts": {str(number): count for number, count in store.database.read(lambda c: c.execute(attempts).all())},
    }


def publisher_check(broker: servers.RabbitMQ, *, count: int) -> dict[str, int]:
    """Publish while the broker is killed; then look whether every confirmed message is there."""
    address = QueueAddress(broker=broker.url, queue="confirmed")
    confirmed: set[Key] = set()
    with open_publisher(address, patience_s=PATIENCE_S) as sender, _killing_once(broker) as (begin, killed):
        for start in range(0, count, 50):
            page = [(Key("confirmed", number), number % 3) for number in range(start, min(start + 50, count))]
            sender.publish(page)
            begin.set()
            confirmed |= {key for key, _ in page}
    seen: Counter[Key] = Counter()
    consumer = RabbitConsumer(broker.url, queue="confirmed", prefetch=500, worker="check", patience_s=PATIENCE_S)
    while taken := consumer.take(1000, timeout_s=3.0):
        seen.update(delivery.key for delivery in taken)
        consumer.acknowledge(taken)
    consumer.close()
    return {
        "confirmed": len(confirmed),
        "lost": len(confirmed - set(seen)),
        "sent_twice": sum(number > 1 for number in seen.values()),
        "broker_kills": len(killed),
    }


def _restart_meanwhile(
    store: JobStore,
    fleet: Fleet,
    broker: servers.RabbitMQ,
    database: servers.MariaDB,
    jobs: int,
    broker_restarts: int,
    database_restarts: int,
    limit_s: float,
    say: Any,
) -> dict[str, int]:
    """Kill the servers at even steps of progress; returns when the job is finished."""
    both = min(broker_restarts, database_restarts)
    plan = ["broker", "database"] * both
    plan += ["broker"] * (broker_restarts - both) + ["database"] * (database_restarts - both)
    done_restarts = {"broker": 0, "database": 0}
    ends = time.monotonic() + limit_s
    while True:
        left = store.counts(["chaos"])["chaos"].unfinished
        done = jobs - left
        step = sum(done_restarts.values())
        if step < len(plan) and done >= jobs * (step + 1) / (len(plan) + 2):
            name = plan[step]
            say(f"{done} of {jobs} done, {fleet.planned} faults to come: killing the {name}")
            (broker if name == "broker" else database).restart()
            done_restarts[name] += 1
        if not left and step >= len(plan):
            return done_restarts
        if time.monotonic() > ends:
            say(f"gave up with {left} left")
            return done_restarts
        time.sleep(0.1)


@contextmanager
def _started() -> Iterator[tuple[servers.RabbitMQ, servers.MariaDB]]:
    broker = servers.RabbitMQ()
    try:
        database = servers.MariaDB()
        try:
            yield broker, database
        finally:
            database.close()
    finally:
        broker.close()


@contextmanager
def _killing_once(server: servers.Server) -> Iterator[tuple[threading.Event, list[float]]]:
    """Kill and start it again once the event is set; the list holds when."""
    begin = threading.Event()
    done: list[float] = []

    def kill() -> None:
        begin.wait()
        time.sleep(0.1)
        server.restart()
        done.append(round(time.time(), 1))

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield begin, done
    finally:
        begin.set()
        thread.join()


def passed(record: dict[str, Any]) -> bool:
    """Nothing lost, doubled or wrong; the poison alone is dead, and lies in the dead-letter queue."""
    counts = ("lost", "duplicated", "wrong", "errors")
    waiting = sum(number for level, number in record["messages_left"].items() if level != "dead")
    return (
        not any(record[name] for name in counts)
        and record["dead"] == [record["poison"]]
        and record["messages_left"]["dead"] >= 1
        and waiting == 0
        and record["publisher"]["lost"] == 0
        and not record["deaths"].get("other")
        and not record["deaths"].get("would not end")
    )


def table(record: dict[str, Any]) -> str:
    """For people."""
    deaths, restarts, sent = record["deaths"], record["restarts"], record["publisher"]
    killed = ", ".join(f"{deaths.get(point, 0)} {point}" for point in POINTS)
    rows = {
        "lost": record["lost"],
        "stored twice": record["duplicated"],
        "other than an undisturbed engine's answer": record["wrong"],
        "errors": record["errors"],
        "dead": f"{len(record['dead'])} (the prompt that kills: {'it alone' if passed(record) else record['dead']})",
        "workers killed by the plan": killed,
        "workers killed by that prompt": deaths.get("poison", 0),
        "broker killed, database killed": f"{restarts['broker']}, {restarts['database']}",
        "items by attempts": ", ".join(f"{count} in {number}" for number, count in record["attempts"].items()),
        "messages left (high, normal, low, dead)": ", ".join(str(n) for n in record["messages_left"].values()),
        "seconds": record["seconds"],
        "messages confirmed while the broker was killed, lost of them": f"{sent['confirmed']}, {sent['lost']}",
    }
    lines = [f"# {record['jobs']} prompts while everything dies, {record['date']}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    verdict = "passed" if record["passed"] else "failed"
    return "\n".join([*lines, "", f"{verdict}; {record['servers']}, {MODEL}.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10, help="at each of the four points")
    parser.add_argument("--broker-restarts", type=int, default=5)
    parser.add_argument("--database-restarts", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    flags = parser.parse_args()
    record = run_chaos(
        jobs=flags.jobs,
        kills=flags.kills,
        broker_restarts=flags.broker_restarts,
        database_restarts=flags.database_restarts,
        workers=flags.workers,
        say=lambda text: print(text, flush=True),
    )
    whole = {
        "date": str(date.today()),
        "hardware": hardware_record(),
        "versions": version_record(),
        "servers": servers.versions("rabbitmq-server", "mariadb-server"),
        "passed": passed(record),
        **record,
    }
    print(json.dumps(whole, indent=2))
    if flags.out:
        Path(f"{flags.out}.json").write_text(json.dumps(whole, indent=2) + "\n")
        Path(f"{flags.out}.md").write_text(table(whole))
    return 0 if whole["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
