"""A Ray cluster of three nodes on this machine works off a queue, and loses one node in the middle.

    python benchmarks/scale/ray_cluster.py                                   # bundled model
    python benchmarks/scale/ray_cluster.py MODEL --prompts 64 --max-tokens 64 --out benchmarks/results/DATE-ray-NAME

Each node has room for one worker. When a third of the prompts is answered, the node of a worker that has items is ended
by SIGKILL, with everything on it; its items are done by others, and its worker starts again where there is room: the
two nodes that are left have room for the three. Answers are held against those of one engine that nobody disturbed;
rows are counted in the table itself.

`--order` also times the same prompts without a loss, before it, with the same engine's own batch beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

# Before Ray is imported: a token of our own, nodes on the loopback, nothing reported.
os.environ.update(
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_USAGE_STATS_ENABLED="0",
)

import psutil
import ray
import sqlalchemy as sql
from ray.cluster_utils import Cluster
from throughput import prompts, submit

from burnish.cli.queue_on_ray import QueueEngine
from burnish.data.bundled import bundled_path
from burnish.measure.hardware import hardware_record, version_record
from burnish.scale.opening import QueueAddress, open_store
from burnish.scale.ray_fleet import Fleet
from burnish.scale.ray_resources import WorkerResources
from burnish.scale.ray_scaling import ScalingRule
from burnish.scale.ray_session import RaySession, open_ray
from burnish.scale.ray_worker import WorkerTask
from burnish.scale.reading import read_results
from burnish.scale.tables import items, results

BUNDLED = "burnish-sql-base"
NODES = 3
LEASE_S = 10.0


def undisturbed(engine: QueueEngine, texts: list[str], params: dict[str, Any]) -> tuple[list[str], float]:
    """The answers of one engine in this process, and seconds of its batch."""
    from burnish.engine.sampling import SamplingParams

    made = engine(1)
    made.warm_up()
    started = time.perf_counter()
    answers = [output.text for output in made.generate(texts, SamplingParams(**params))]
    return answers, time.perf_counter() - started


class Watch:
    """When results came, by the database; ends a node once a share of them is there."""

    def __init__(self, store: Any, fleet: Fleet, cluster: Cluster, *, total: int, lose_at: int | None) -> None:
        self._store, self._fleet, self._cluster = store, fleet, cluster
        self._total, self._lose_at = total, lose_at
        self.first: tuple[float, int] | None = None
        self.last_s = 0.0
        self.lost: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        while True:
            left = self._store.depth("default").unfinished
            done, now_s = self._total - left, time.perf_counter()
            if done and self.first is None:
                self.first = (now_s, done)
            if self._lose_at is not None and self.lost is None and done >= self._lose_at:
                self._lose(done)
            if not left:
                self.last_s = now_s
                return
            time.sleep(0.05)

    def _lose(self, done: int) -> None:
        """SIGKILL to a node's server; what runs on it dies with it."""
        of_node = {id(node): _processes(node) for node in self._cluster.worker_nodes}
        working = {worker.pid for worker in self._fleet.workers if worker.working}
        for node in self._cluster.worker_nodes:
            ours = of_node[id(node)]
            worker = working & {process.pid for process in ours}
            if worker:
                held = self._held_by(next(iter(worker)))
                node.kill_raylet(check_alive=False)
                psutil.wait_procs(ours, timeout=60)
                self.lost = {"results_before": done, "worker_pid": next(iter(worker)), "items_held_there": held}
                return

    def _held_by(self, pid: int) -> int:
        from burnish.scale.worker_book import read_notes

        names = [note.name for note in read_notes(self._store.database) if note.pid == pid]
        query = sql.select(sql.func.count()).where(items.c.worker.in_(names), items.c.state == "running")
        return self._store.database.read(lambda connection: int(connection.execute(query).scalar_one()))


def _processes(node: Any) -> list[psutil.Process]:
    """A node's server and everything that it started."""
    [entry] = [entries[0] for kind, entries in node.all_processes.items() if kind == "raylet"]
    server = psutil.Process(entry.process.pid)
    return [server, *server.children(recursive=True)]


def run_queue(
    session: RaySession,
    cluster: Cluster,
    address: QueueAddress,
    engine: QueueEngine,
    texts: list[str],
    params: dict[str, Any],
    *,
    lose: bool,
    say: Any,
) -> dict[str, Any]:
    """Work off the prompts; returns what was lost, doubled or wrong, and how long it took."""
    job, _ = submit(address, texts, params)
    task = WorkerTask(
        address=address,
        open_engine=engine,
        model=engine.model,
        slots=engine.slots,
        threads=1,
        lease_s=LEASE_S,
        until_empty=True,
    )
    rule = ScalingRule(least=NODES, most=NODES, items_per_worker=1)
    fleet = Fleet(session=session, task=task, resources=WorkerResources(cpus=1), rule=rule, start=NODES, say=say)
    with open_store(address) as store:
        watch = Watch(store, fleet, cluster, total=len(texts), lose_at=len(texts) // 3 if lose else None)
        report = fleet.run()
        watch.join()
        rows = list(read_results(store.database, job))
        of_job = results.c.job_id == job
        twice = sql.select(results.c.item_id).where(of_job).group_by(results.c.item_id).having(sql.func.count() > 1)
        by_worker = sql.select(results.c.worker, sql.func.count()).where(of_job).group_by(results.c.worker)
        attempts = (
            sql.select(items.c.attempts, sql.func.count()).where(items.c.job_id == job).group_by(items.c.attempts)
        )
        doubled = store.database.read(lambda c: len(c.execute(twice).all()))
        shares = store.database.read(lambda c: sorted(count for _, count in c.execute(by_worker).all()))
        tried = store.database.read(lambda c: {str(n): count for n, count in c.execute(attempts).all()})
    assert watch.first is not None
    seconds = watch.last_s - watch.first[0]
    return {
        "answers": [row["text"] for row in rows],
        "lost": len(texts) - len(rows),
        "doubled": doubled,
        "errors": sum(row["error"] is not None for row in rows),
        "seconds_first_to_last": seconds,
        "inputs_per_s": (len(texts) - watch.first[1]) / seconds,
        "restarts": report.restarts,
        "results_by_worker": shares,
        "items_by_attempts": tried,
        "node_lost": watch.lost,
    }


def table(record: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"# Three Ray nodes on one machine, one of them lost, {record['date']}",
        "",
        f"{record['model']} ({record['dtype']}, quantize {record['quantize']}), {record['prompts']} prompts, "
        f"{record['max_tokens']} tokens each; SQLite; a worker of one thread and {record['slots']} slots on each node; "
        f"lease {LEASE_S:g} s; {record['hardware']['cpu']}, {record['hardware']['cores']} cores, load average "
        f"{record['load_before']:.1f} before; Ray {record['ray']}. Timed from the first stored result to the last.",
        "",
        "| | inputs/s | lost | doubled | wrong | results by worker | items by attempts |",
        "|---|---|---|---|---|---|---|",
    ]
    if record.get("engine_per_s"):
        lines.append(f"| one engine of one thread, no queue | {record['engine_per_s']:.2f} | | | | | |")
    for name, found in record["runs"].items():
        lines.append(
            f"| {name} | {found['inputs_per_s']:.2f} | {found['lost']} | {found['doubled']} | {found['wrong']} "
            f"| {', '.join(map(str, found['results_by_worker']))} "
            f"| {', '.join(f'{count} in {n}' for n, count in found['items_by_attempts'].items())} |"
        )
    lost = record["runs"]["a node lost"]["node_lost"]
    lines += [
        "",
        f"The node was killed when {lost['results_before']} results were stored; its worker held "
        f"{lost['items_held_there']} items, which came back when their lease lapsed.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(bundled_path(BUNDLED)))
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--dtype", default="float32", help="float32, so that answers do not depend on the batch")
    parser.add_argument("--order", default="undisturbed,lost", help="runs, in turn: undisturbed, lost")
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    flags = parser.parse_args()
    texts, params = prompts(flags.prompts), {"max_tokens": flags.max_tokens, "ignore_eos": True}
    engine = QueueEngine(
        model=str(Path(flags.model).resolve()),
        adapter=None,
        slots=flags.slots,
        source={"device": "cpu", "dtype": flags.dtype, "threads": 1},
        options={"quantize": flags.quantize, "speculation": "off"},
    )
    load = os.getloadavg()[0]
    expected, seconds = undisturbed(engine, texts, params)
    names = {"undisturbed": "three nodes", "lost": "a node lost"}
    runs: dict[str, Any] = {}
    for kind in flags.order.split(","):
        with tempfile.TemporaryDirectory(prefix="ray-bench-") as folder:
            address = QueueAddress(store=f"sqlite:///{folder}/queue.db")
            Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)  # Ray writes the cluster's address there
            # The head has no room for workers, so that losing any of the three loses nothing else.
            cluster = Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20, "temp_dir": f"{folder}/ray"},
            )
            try:
                for _ in range(NODES):
                    cluster.add_node(num_cpus=2 if kind == "lost" else 1, object_store_memory=80 * 2**20)
                with open_ray(cluster.address, cpus=NODES) as session:
                    found = run_queue(
                        session,
                        cluster,
                        address,
                        engine,
                        texts,
                        params,
                        lose=kind == "lost",
                        say=lambda s: print(s, flush=True),
                    )
            finally:
                cluster.shutdown()
        found["wrong"] = sum(text != right for text, right in zip(found.pop("answers"), expected))
        runs[names[kind]] = found
        print(f"{kind}: {json.dumps(found)}", flush=True)
    record = {
        "date": str(date.today()),
        "hardware": hardware_record(),
        "versions": version_record(),
        "ray": ray.__version__,
        "load_before": load,
        "model": Path(flags.model).name,
        "dtype": flags.dtype,
        "quantize": flags.quantize,
        "prompts": flags.prompts,
        "max_tokens": flags.max_tokens,
        "slots": flags.slots,
        "engine_per_s": len(texts) / seconds,
        "runs": runs,
    }
    if flags.out:
        Path(f"{flags.out}.json").write_text(json.dumps(record, indent=2) + "\n")
        if "a node lost" in runs:
            Path(f"{flags.out}.md").write_text(table(record))
    print(json.dumps(record, indent=2))
    good = all(not found[name] for found in runs.values() for name in ("lost", "doubled", "wrong", "errors"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
