"""RabbitMQ, a real server: confirmed publishing, acknowledging after the commit, dead letters, priorities."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from queue_fakes import Background, TurningEngine, submit, work

from burnish.errors import BurnishError, ConfigError
from burnish.scale import rabbit
from burnish.scale.items import Key
from burnish.scale.opening import QueueAddress, open_publisher
from burnish.scale.rabbit_consumer import RabbitConsumer
from burnish.scale.reading import read_results
from burnish.scale.store import JobStore
from burnish.scale.submit import retry

pytestmark = pytest.mark.services


@pytest.fixture
def address(rabbitmq: Any, tmp_path: Path) -> QueueAddress:
    """A queue of its own name over SQLite and the broker."""
    name = f"q{time.time_ns()}"
    return QueueAddress(store=f"sqlite:///{tmp_path / 'queue.db'}", broker=rabbitmq.url, queue=name)


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """This broker is not killed, so that its queues may be used at once."""
    monkeypatch.setattr(rabbit, "SETTLE_S", 0.0)


@pytest.fixture
def publisher(address: QueueAddress) -> Iterator[Any]:
    with open_publisher(address, patience_s=300.0) as opened:
        yield opened


def test_items_go_through_the_broker_and_are_acknowledged(
    address: QueueAddress, store: JobStore, publisher: Any, tmp_path: Path
) -> None:
    job = submit(store, tmp_path, [f"p{number}" for number in range(300)], publisher=publisher, queue=address.queue)
    assert publisher.depths() == {"high": 0, "normal": 300, "low": 0, "dead": 0}
    assert work(address, TurningEngine()).done == 300
    assert [row["text"] for row in read_results(store.database, job)] == [f"p{n}"[::-1] for n in range(300)]
    assert publisher.depths() == {"high": 0, "normal": 0, "low": 0, "dead": 0}


def test_redelivered_items_change_nothing(
    address: QueueAddress, store: JobStore, publisher: Any, tmp_path: Path
) -> None:
    job = submit(store, tmp_path, ["a", "b"], publisher=publisher, queue=address.queue)
    publisher.publish([(Key(job, number % 2), 1) for number in range(10)])
    engine = TurningEngine()
    assert work(address, engine).done == 2
    before = list(read_results(store.database, job))
    publisher.publish([(Key(job, 0), 1)])
    later = submit(store, tmp_path, ["c"], publisher=publisher, queue=address.queue, params={"max_tokens": 1})
    work(address, engine)
    assert list(read_results(store.database, job)) == before
    assert sorted(engine.order) == ["a", "b", "c"]
    assert store.counts([later])[later]["done"] == 1


def test_high_priority_overtakes_low(address: QueueAddress, store: JobStore, publisher: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"low {number}", "priority": "low"} for number in range(60)]
    submit(store, tmp_path, [*rows, {"prompt": "urgent", "priority": "high"}], publisher=publisher, queue=address.queue)
    engine = TurningEngine(on_step=lambda: time.sleep(0.01))
    work(address, engine)
    # It may arrive after the low ones that were begun already, never after those that wait.
    assert engine.order.index("urgent") <= 8


def test_dead_item_lies_in_the_dead_letter_queue_and_can_be_tried_again(
    address: QueueAddress, store: JobStore, publisher: Any, tmp_path: Path
) -> None:
    job = submit(store, tmp_path, ["a", "killer"], publisher=publisher, queue=address.queue, max_attempts=2)
    for _ in range(2):
        store.begin([Key(job, 1)], worker="that died")
    report = work(address, TurningEngine())
    assert (report.done, report.dead) == (1, 1)
    assert publisher.depths()["dead"] == 1
    assert retry(store, publisher, job) == 1
    assert publisher.depths()["dead"] == 0
    assert work(address, TurningEngine()).done == 1
    assert [row["error"] for row in read_results(store.database, job)] == [None, None]


def test_messages_of_others_go_to_the_dead_unread(address: QueueAddress, publisher: Any, store: JobStore) -> None:
    async def send() -> None:
        await publisher._opened()
        message = publisher._library.Message(b"not ours")
        await publisher._channel.default_exchange.publish(message, rabbit.level_names(address.queue)[1])

    publisher._thread.run(send())
    with Background(address, TurningEngine()) as background:
        ends = time.monotonic() + 300
        while publisher.depths()["dead"] != 1:
            assert time.monotonic() < ends
    assert background.error is None


def test_queue_that_vanished_is_made_again_and_nothing_confirmed_is_lost(
    address: QueueAddress, store: JobStore, publisher: Any, tmp_path: Path
) -> None:
    async def delete() -> None:
        await publisher._queues[1].delete(if_unused=False, if_empty=False)

    publisher._thread.run(delete())
    submit(store, tmp_path, ["a", "b"], publisher=publisher, queue=address.queue)
    assert publisher.depths()["normal"] == 2


@pytest.mark.parametrize(
    "url",
    ["http://host/", "amqp://", "rabbit", "amqp://host:port/", "amqp://host:99999", "amqp://[::bad/", "amqp://a b/"],
)
def test_malformed_broker_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--broker is malformed"):
        QueueAddress(broker=url)


def test_looking_makes_no_queues(address: QueueAddress) -> None:
    for _ in range(2):
        with open_publisher(address, patience_s=300.0, makes=False) as looking:
            assert looking.depths() == {"high": 0, "normal": 0, "low": 0, "dead": 0}
            connection = looking._connection
            assert looking._thread.run(rabbit.depth(connection, rabbit.dead_name(address.queue))) is None


def test_consumer_that_fails_for_a_reason_of_its_own_tells_it(
    address: QueueAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("no such thing")

    monkeypatch.setattr(rabbit, "declare", broken)
    assert address.broker is not None
    with pytest.raises(BurnishError, match="no such thing"):
        RabbitConsumer(address.broker, queue=address.queue, prefetch=1, worker="w", patience_s=300.0)


def test_host_that_cannot_be_asked_for_is_told() -> None:
    with (
        pytest.raises(ConfigError, match="--broker is malformed"),
        open_publisher(QueueAddress(broker=f"amqp://{'a' * 70}.b/"), patience_s=300.0),
    ):
        pass


def test_broker_that_is_not_there_or_refuses_is_told(rabbitmq: Any) -> None:
    with (
        pytest.raises(BurnishError, match="does not answer"),
        open_publisher(QueueAddress(broker="amqp://me:secret@127.0.0.1:1/"), patience_s=0.3),
    ):
        pass
    wrong = rabbitmq.url.replace("guest:guest", "guest:secret")
    with (
        pytest.raises(ConfigError, match="refuses us") as caught,
        open_publisher(QueueAddress(broker=wrong), patience_s=30.0),
    ):
        pass
    assert "secret" not in caught.value.message
    with (
        pytest.raises(BurnishError, match="Is there such a virtual host"),
        open_publisher(QueueAddress(broker=f"{rabbitmq.url}nothere"), patience_s=0.3),
    ):
        pass
