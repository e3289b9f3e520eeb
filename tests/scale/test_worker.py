"""A worker over SQLite, with an engine that needs no model."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import sqlalchemy as sql
from queue_fakes import Background, TurningEngine, submit, work

from burnish.errors import ConfigError, WorkerError
from burnish.scale.brokers import Delivery
from burnish.scale.holdings import Holdings, Work
from burnish.scale.items import Key
from burnish.scale.leases import LeasingConsumer
from burnish.scale.opening import QueueAddress
from burnish.scale.reading import read_results
from burnish.scale.store import JobStore, Loaded, Outcome
from burnish.scale.tables import DEAD, DONE, PENDING, RUNNING, items
from burnish.scale.worker import Worker
from burnish.scale.worker_settings import WorkerSettings


def wait_until(true: object, seconds: float = 300.0) -> None:
    ends = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < ends, "it never came"
        time.sleep(0.01)


def texts(store: JobStore, job: str) -> list[str | None]:
    return [row["text"] for row in read_results(store.database, job)]


def test_every_item_gets_its_answer_in_a_running_batch(store: JobStore, address: QueueAddress, tmp_path: Path) -> None:
    prompts = [f"prompt {number}" for number in range(50)]
    job = submit(store, tmp_path, prompts)
    engine = TurningEngine(slots=4)
    report = work(address, engine)
    assert (report.done, report.errors, report.dead) == (50, 0, 0)
    assert texts(store, job) == [prompt[::-1] for prompt in prompts]
    assert 4 < engine.most <= 6
    assert {row["attempts"] for row in read_results(store.database, job)} == {1}


def test_bad_items_become_error_rows_and_others_go_on(store: JobStore, address: QueueAddress, tmp_path: Path) -> None:
    rows = ["one", "bad", "two", {"prompt": "x", "params": {"min_tokens": 9}}]
    job = submit(store, tmp_path, rows[:3])
    # Parameters that only exclude each other together are found by the worker when they were stored by another version.
    store.database.write(
        lambda connection: connection.exec_driver_sql(
            "UPDATE burnish_items SET params = ? WHERE prompt = ?", (json.dumps({"min_tokens": 9}), '"two"')
        )
    )
    report = work(address, TurningEngine())
    assert (report.done, report.errors) == (1, 2)
    first, second, third = read_results(store.database, job)
    assert (first["text"], second["error"]) == ("eno", "a prompt is empty")
    assert "min_tokens is larger" in third["error"]


def test_prompt_that_breaks_a_step_fails_alone(store: JobStore, address: QueueAddress, tmp_path: Path) -> None:
    job = submit(store, tmp_path, [*[f"p{number}" for number in range(10)], "broken", "after"])
    engine = TurningEngine()
    report = work(address, engine)
    assert (report.done, report.errors) == (11, 1)
    [failed] = [row for row in read_results(store.database, job) if row["error"]]
    assert failed["item"] == 10
    assert "RuntimeError: a step failed" in failed["error"]
    assert engine.together[-1] == ["broken"]


def test_engine_that_always_fails_ends_the_worker_and_gives_items_back(
    store: JobStore, address: QueueAddress, tmp_path: Path
) -> None:
    def fail() -> None:
        raise RuntimeError("no device")

    submit(store, tmp_path, [f"p{number}" for number in range(40)])
    with pytest.raises(WorkerError, match="again and again"):
        work(address, TurningEngine(on_step=fail))
    depth = store.depth("default")
    assert depth.running == 0
    assert depth.pending > 20


@pytest.mark.parametrize("at", ["step", "submit"])
def test_engine_that_lost_a_process_ends_the_worker_and_blames_no_item(
    store: JobStore, address: QueueAddress, tmp_path: Path, at: str
) -> None:
    def fail(*_: object) -> int:
        raise WorkerError("rank 1 was killed")

    job = submit(store, tmp_path, [f"p{number}" for number in range(10)])
    engine = TurningEngine(on_step=fail if at == "step" else lambda: None)  # type: ignore[arg-type]
    if at == "submit":
        engine.submit = fail  # type: ignore[method-assign]
    with pytest.raises(WorkerError, match="rank 1 was killed"):
        work(address, engine)
    assert store.counts([job])[job].states[PENDING] == 10
    assert work(address, TurningEngine()).done == 10


def test_drain_finishes_what_is_begun_and_gives_back_the_rest(
    store: JobStore, address: QueueAddress, tmp_path: Path
) -> None:
    job = submit(store, tmp_path, [f"p{number}" for number in range(60)], params={"max_tokens": 20})
    engine = TurningEngine(on_step=lambda: time.sleep(0.005))
    with Background(address, engine) as background:
        wait_until(lambda: engine.order)
    assert background.error is None
    states = store.counts([job])[job].states
    assert states[DONE] == len(engine.order) > 0
    assert (states[DONE] + states[PENDING], states[RUNNING]) == (60, 0)
    assert work(address, TurningEngine()).done == states[PENDING]


def test_items_that_come_later_join_the_batch(store: JobStore, address: QueueAddress, tmp_path: Path) -> None:
    with Background(address, TurningEngine()) as background:
        for count in (1, 3):
            job = submit(store, tmp_path, [f"p{number}" for number in range(count)])
            wait_until(lambda job=job: not store.counts([job])[job].unfinished)
    assert background.report is not None
    assert background.report.done == 4


def test_high_priority_overtakes_what_waits(store: JobStore, address: QueueAddress, tmp_path: Path) -> None:
    submit(store, tmp_path, [{"prompt": f"low {number}", "priority": "low"} for number in range(40)])
    submit(store, tmp_path, [{"prompt": "urgent", "priority": "high"}])
    engine = TurningEngine()
    work(address, engine)
    assert engine.order[0] == "urgent"


def test_item_whose_workers_always_die_is_dead_alone(store: JobStore, address: QueueAddress, tmp_path: Path) -> None:
    class Died(BaseException):
        """A worker's sudden end: what it holds stays as it is, until the lease is over."""

    class Dying(Worker):
        def commit(self, outcomes: list[Outcome]) -> None:  # type: ignore[override]
            super().commit(outcomes)

    job = submit(store, tmp_path, [*[f"p{number}" for number in range(9)], "poison", "last"], max_attempts=4)
    lives = 0
    while store.counts([job])[job].unfinished:
        lives += 1
        assert lives < 20
        engine = TurningEngine()

        def step(engine: TurningEngine = engine) -> None:
            if any(prompt == "poison" for prompt, _ in engine.running.values()):
                raise Died

        engine.on_step = step
        try:
            work(address, engine, make=Dying)
        except Died:
            # The process would be gone with its leases: let them lapse.
            store.database.write(
                lambda connection: connection.exec_driver_sql(
                    "UPDATE burnish_items SET state = 'running', lease_until_s = 0 WHERE state = 'pending'"
                )
            )
    assert lives == 5
    rows = list(read_results(store.database, job))
    assert [row["item"] for row in rows if row["error"]] == [9]
    assert "its worker died 4 times" in rows[9]["error"]
    assert store.counts([job])[job][DEAD] == 1


def test_unknown_items_end_the_worker(store: JobStore, address: QueueAddress) -> None:
    class Stranger:
        ready = False
        closed = False

        def take(self, limit: int, *, timeout_s: float) -> list[Delivery]:
            return [Delivery(key=Key("elsewhere", 1))]

        def release(self, deliveries: list[Delivery]) -> None: ...

        def renew(self) -> None: ...

        def close(self) -> None:
            self.closed = True

    consumer = Stranger()
    settings = WorkerSettings(queue="default", name="w", model="m", slots=2)
    worker = Worker(TurningEngine(), store=store, consumer=consumer, settings=settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the store does not know"):
        worker.run()
    assert consumer.closed


def test_leases_are_renewed_while_an_item_takes_long(store: JobStore, tmp_path: Path) -> None:
    class Counting(LeasingConsumer):
        renewals = 0

        def renew(self) -> None:
            super().renew()
            self.renewals += 1

    job = submit(store, tmp_path, ["long"])
    consumer = Counting(store.database, queue="default", worker="w", lease_s=3600.0)
    untils: list[float] = []

    def step() -> None:
        # The engine is busy until the lease was renewed twice, whatever that takes.
        seen = consumer.renewals
        wait_until(lambda: consumer.renewals >= seen + 2)
        untils.append(store.database.read(lambda c: c.execute(sql.select(items.c.lease_until_s)).scalar_one()))

    settings = WorkerSettings(queue="default", name="w", model="m", slots=2, until_empty=True, beat_s=0.01)
    Worker(TurningEngine(on_step=step), store=store, consumer=consumer, settings=settings).run()
    assert untils == sorted(set(untils))
    assert texts(store, job) == ["gnol"]


def test_holdings_run_suspects_alone_and_in_turn() -> None:
    from burnish.engine.sampling import SamplingParams

    def item(number: int, *, attempts: int = 0, rank: int = 1) -> Work:
        loaded = Loaded(
            key=Key("j", number),
            rank=rank,
            prompt="p",
            params=None,
            job_params={},
            attempts=attempts,
            max_attempts=5,
            state=PENDING,
        )
        return Work(loaded=loaded, params=SamplingParams())

    held = Holdings(room=3, slots=3)
    for work_item in (item(1), item(2, rank=0), item(3), item(4), item(5, attempts=1)):
        held.add(work_item)
    assert [one.key.item_id for one in held.next_batch()] == [2, 1, 3]
    held.add(item(7, attempts=4))
    held.add(item(6, attempts=2))
    held.finish([Key("j", 2)])
    # Not proven yet: others go first, while there are any.
    assert [one.key.item_id for one in held.next_batch()] == [4]
    held.finish([Key("j", 1), Key("j", 3)])
    # Now suspects come before what still waits, once the last one has left and every result is stored.
    assert held.next_batch() == []
    held.finish([Key("j", 4)])
    assert held.next_batch() == []
    held.drop([Key("j", 1), Key("j", 2), Key("j", 3), Key("j", 4)])
    for number in (6, 7):
        assert [one.key.item_id for one in held.next_batch()] == [number]
        assert held.next_batch() == []
        held.finish([Key("j", number)])
        assert held.next_batch() == []  # nothing beside an answer that is not stored yet
        held.drop([Key("j", number)])
    assert [one.key.item_id for one in held.next_batch()] == [5]
