"""A queue worked off by Ray actors: killed, too many, too few, drained; and by the command on a cluster that is joined.

One Ray for all of it, with a folder, ports and a token of its own.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sql
from queue_fakes import submit

pytest.importorskip("ray", reason="the extra ray brings it")
import ray_engines

from burnish.cli.queue_on_ray import QueueEngine
from burnish.scale.opening import QueueAddress
from burnish.scale.ray_fleet import Fleet, FleetReport
from burnish.scale.ray_resources import WorkerResources
from burnish.scale.ray_scaling import ScalingRule
from burnish.scale.ray_session import RaySession, open_ray
from burnish.scale.ray_shards import Shards
from burnish.scale.ray_worker import WorkerTask
from burnish.scale.reading import read_results
from burnish.scale.store import JobStore
from burnish.scale.tables import items

# Threads that Ray's own shutdown leaves behind complain about sockets that are closed under them.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
ONE = WorkerResources(cpus=1)


def of_folder(folder: str) -> list[psutil.Process]:
    """Processes of one Ray: those that were given its folder, and what they started."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(folder in word for word in process.cmdline()):
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    return [process for process in found.values() if process.is_running() and process.pid != os.getpid()]


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([path] if path else [])])
    try:
        with open_ray("local", cpus=4) as opened:
            yield opened
    finally:
        os.environ.pop("PYTHONPATH")
        if path:
            os.environ["PYTHONPATH"] = path
    assert opened.folder is not None
    assert not Path(opened.folder).exists()
    _, alive = psutil.wait_procs(of_folder(opened.folder), timeout=60)
    assert not alive


class Running:
    """A fleet in a thread; drained at the end of the block."""

    def __init__(self, session: RaySession, address: QueueAddress, rule: ScalingRule, **task: Any) -> None:
        whole = {"open_engine": ray_engines.slow_engine, "model": "turning", "slots": 4, "lease_s": 3.0, **task}
        self.said: list[str] = []
        self.fleet = Fleet(
            session=session,
            task=WorkerTask(address=address, threads=1, **whole),
            resources=ONE,
            rule=rule,
            start=rule.least,
            say=self.said.append,
        )
        self.report: FleetReport | None = None
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.report = self.fleet.run()

    def __enter__(self) -> Running:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.fleet.drain()
        self.thread.join(300)
        print(*self.said, sep="\n")  # shown when the test fails
        assert self.report is not None

    def working(self) -> list[int]:
        return [worker.pid for worker in self.fleet.workers if worker.working]


def wait_until(true: Callable[[], Any], seconds: float = 300.0) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.05)


def begun_by(store: JobStore) -> int:
    """How many workers have begun something."""
    query = sql.select(sql.func.count(items.c.worker.distinct())).where(items.c.attempts > 0)
    return store.database.read(lambda connection: int(connection.execute(query).scalar_one()))


def fixed(count: int) -> ScalingRule:
    return ScalingRule(least=count, most=count, items_per_worker=18)


def test_grows_loses_a_worker_shrinks_and_stores_every_answer_once(
    session: RaySession, store: JobStore, address: QueueAddress, tmp_path: Path
) -> None:
    prompts = [f"prompt {number}" for number in range(120)]
    job = submit(store, tmp_path, prompts, max_attempts=50)
    rule = ScalingRule(least=1, most=2, items_per_worker=18, shrink_after_s=0.5)
    gate = tmp_path / "gate"
    engine = functools.partial(ray_engines.gated_engine, str(gate))
    with Running(session, address, rule, open_engine=engine) as running:
        wait_until(lambda: len(running.working()) == 2 and begun_by(store) == 2)
        killed = running.working()[-1]
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len(running.working()) == 2 and killed not in running.working())
        gate.touch()
        wait_until(lambda: not store.counts([job])[job].unfinished)
        wait_until(lambda: len(running.fleet.workers) == 1 and any("one too many" in line for line in running.said))
    rows = list(read_results(store.database, job))
    assert [row["text"] for row in rows] == [prompt[::-1] for prompt in prompts]
    report = running.report
    assert report is not None
    assert (report.done, report.errors, report.exit_code, report.most_workers) == (120, 0, 0, 2)
    assert report.restarts == 1
    assert sum(f"pid {killed}): it died; starting it again" in line for line in running.said) == 1
    assert store.depth("default").unfinished == 0


def test_drain_finishes_what_is_begun_and_gives_back_the_rest(
    session: RaySession, store: JobStore, address: QueueAddress, tmp_path: Path
) -> None:
    job = submit(store, tmp_path, [f"prompt {number}" for number in range(200)], params={"max_tokens": 60})
    with Running(session, address, fixed(1)) as running:
        wait_until(lambda: store.counts([job])[job]["done"])
    states = store.counts([job])[job].states
    assert running.report is not None
    assert running.report.done == states["done"] < 200
    assert (states["running"], states["done"] + states["pending"]) == (0, 200)


def test_what_starting_again_does_not_mend_ends_the_fleet_with_its_code(
    session: RaySession, store: JobStore, address: QueueAddress
) -> None:
    with Running(session, address, fixed(1), open_engine=ray_engines.missing_engine) as running:
        running.thread.join(300)
        assert not running.thread.is_alive()
    assert running.report is not None
    assert (running.report.exit_code, running.report.restarts) == (2, 0)
    assert any("there is no model here" in line for line in running.said)


def test_everything_that_was_started_listens_on_the_loopback_only(session: RaySession) -> None:
    assert session.folder is not None
    addresses = set()
    for process in of_folder(session.folder):
        with suppress(psutil.Error):
            found = process.net_connections(kind="tcp")
            addresses |= {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def command(session: RaySession, address: QueueAddress, *words: str, **environment: str) -> subprocess.Popen[str]:
    where = ["--ray", session.address, "--store", address.store, "--threads", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "burnish", "queue", "work", "burnish-sql-base", *where, *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_cluster_refuses_whoever_has_another_token(session: RaySession, address: QueueAddress) -> None:
    _, said = (process := command(session, address, RAY_AUTH_TOKEN="0" * 64)).communicate(timeout=300)
    assert process.returncode == 1
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"the Ray cluster {session.address} cannot be joined" in errors[0]


def test_sharded_engine_in_a_placement_group_outlives_a_rank(
    session: RaySession, store: JobStore, address: QueueAddress, tmp_path: Path
) -> None:
    from burnish.engine.native import NativeEngine
    from burnish.engine.sampling import SamplingParams

    prompts = [f"{number}: list the cities by age" for number in range(60)]
    job = submit(store, tmp_path, prompts, params={"max_tokens": 40, "ignore_eos": True}, max_attempts=50)
    source = {"dtype": "float32", "threads": 1}
    engine = QueueEngine(model="burnish-sql-base", adapter=None, slots=8, source=source, options={"tensor_parallel": 2})
    shards = Shards(tensor_parallel=2, resources=ONE)
    with Running(session, address, fixed(1), open_engine=engine, slots=8, shards=shards) as running:
        wait_until(lambda: store.counts([job])[job]["done"])
        followers = [process for process in of_folder(str(session.folder)) if "ray::Rank" in "".join(process.cmdline())]
        assert len(followers) == 1
        followers[0].kill()
        wait_until(lambda: not store.counts([job])[job].unfinished)
    alone = NativeEngine("burnish-sql-base", max_num_seqs=8, threads=1, dtype="float32", speculation="off")
    outputs = alone.generate(prompts, SamplingParams(max_tokens=40, ignore_eos=True))
    rows = list(read_results(store.database, job))
    assert [row["text"] for row in rows] == [output.text for output in outputs]
    assert running.report is not None
    assert (running.report.done, running.report.errors, running.report.restarts) == (60, 0, 1)


def test_command_joins_a_cluster_and_drains_at_sigterm(
    session: RaySession, store: JobStore, address: QueueAddress, tmp_path: Path
) -> None:
    job = submit(store, tmp_path, ["CREATE TABLE"] * 500, params={"max_tokens": 100, "ignore_eos": True})
    with command(session, address, "--concurrency", "4") as process:
        try:
            wait_until(lambda: store.counts([job])[job]["done"] or process.poll() is not None)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, said
    assert "finishing what is begun" in said
    states = store.counts([job])[job].states
    assert 0 < states["done"] < 500
    assert (states["running"], states["error"]) == (0, 0)
