"""Servers and workers are killed while they work, and every prompt still gets exactly one right answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from private_servers import started
from queue_fakes import Background, TurningEngine, submit

from burnish.scale.opening import QueueAddress, open_publisher
from burnish.scale.reading import read_results
from burnish.scale.store import JobStore

pytestmark = [pytest.mark.services, pytest.mark.slow]


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[Any]:
    """A broker to kill, whose queues were all left alone for as long as they need."""
    yield from started("rabbitmq")


@pytest.fixture
def address(rabbitmq: Any, tmp_path: Path) -> QueueAddress:
    return QueueAddress(store=f"sqlite:///{tmp_path / 'queue.db'}", broker=rabbitmq.url, queue=f"q{time.time_ns()}")


@pytest.fixture
def publisher(address: QueueAddress) -> Iterator[Any]:
    with open_publisher(address, patience_s=300.0) as opened:
        yield opened


def test_worker_and_publisher_outlive_a_broker_that_is_killed(
    address: QueueAddress, rabbitmq: Any, store: JobStore, publisher: Any, tmp_path: Path
) -> None:
    prompts = [f"p{number}" for number in range(200)]
    job = submit(store, tmp_path, prompts, publisher=publisher, queue=address.queue)
    engine = TurningEngine(on_step=lambda: time.sleep(0.002))
    with Background(address, engine, patience_s=300.0) as background:
        restarting = threading.Thread(target=rabbitmq.restart)
        restarting.start()
        more = submit(store, tmp_path, prompts, publisher=publisher, queue=address.queue)
        restarting.join()
        ends = time.monotonic() + 300
        while store.depth(address.queue).unfinished:
            assert background.error is None
            assert time.monotonic() < ends, store.depth(address.queue)
            time.sleep(0.05)
    assert background.error is None
    for name in (job, more):
        assert [row["text"] for row in read_results(store.database, name)] == [text[::-1] for text in prompts]


def test_nothing_is_lost_doubled_or_wrong_when_everything_dies(rabbitmq: Any, mariadb: Any) -> None:
    import chaos

    record = chaos.run_chaos(
        jobs=60, kills=1, broker_restarts=1, database_restarts=1, max_tokens=8, running=(rabbitmq, mariadb), limit_s=600
    )
    assert chaos.passed(record), record
    assert sum(record["deaths"].get(point, 0) for point in chaos.POINTS) >= 3, record["deaths"]
