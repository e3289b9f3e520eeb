"""What the result store promises, on SQLite and on real MariaDB and PostgreSQL servers."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sql
from queue_fakes import submit, write_prompts

from burnish.errors import BurnishError, ConfigError, DataError
from burnish.scale.database import Database, _may_pass, parse_url
from burnish.scale.items import Key
from burnish.scale.leases import LeasingConsumer, NoPublisher
from burnish.scale.reading import read_keys, read_results
from burnish.scale.store import Job, JobStore, Outcome
from burnish.scale.submit import submit_file
from burnish.scale.tables import DEAD, DONE, ERROR, PENDING
from burnish.scale.worker_book import held_by, read_notes, write_note

pytestmark = pytest.mark.services


def answer(key: Key, text: str = "answer") -> Outcome:
    return Outcome(key=key, answer={"text": text, "finish_reason": "stop"}, prompt_tokens=1, output_tokens=2)


def counts(store: JobStore, job: str) -> dict[str, int]:
    return {state: number for state, number in store.counts([job])[job].states.items() if number}


def test_first_result_of_an_item_stays(any_store: JobStore, tmp_path: Path) -> None:
    job = submit(any_store, tmp_path, ["ä 💡 prompt", "b"])
    key = Key(job, 0)
    any_store.begin([key], worker="w")
    any_store.commit([answer(key, "ünïcode 💡")], worker="w", model="m")
    any_store.commit([answer(key, "second")], worker="other", model="m")
    any_store.commit([Outcome(key=key, error="third")], worker="other", model="m")
    [row] = read_results(any_store.database, job)
    assert (row["text"], row["error"], row["attempts"], row["model"]) == ("ünïcode 💡", None, 1, "m")
    assert counts(any_store, job) == {DONE: 1, PENDING: 1}


def test_racing_workers_store_one_result(any_store: JobStore, tmp_path: Path) -> None:
    job = submit(any_store, tmp_path, [f"p{number}" for number in range(20)])
    keys = [Key(job, number) for number in range(20)]

    def race(worker: int) -> None:
        order = keys if worker % 2 else keys[::-1]
        for start in range(0, 20, 5):
            any_store.begin(order[start : start + 5], worker=f"w{worker}")
            outcomes = [answer(key, f"by {worker}") for key in order[start : start + 5]]
            any_store.commit(outcomes, worker=f"w{worker}", model="m")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(race, range(4)))
    rows = list(read_results(any_store.database, job))
    assert [row["item"] for row in rows] == list(range(20))
    assert counts(any_store, job) == {DONE: 20}
    # Whoever was first is stored as the worker as well: row and answer are of one piece.
    assert all(row["text"].startswith("by ") for row in rows)


def test_attempts_are_counted_and_the_dead_may_still_be_done(any_store: JobStore, tmp_path: Path) -> None:
    job = submit(any_store, tmp_path, ["a"], max_attempts=2)
    key = Key(job, 0)
    for _ in range(2):
        any_store.begin([key], worker="w")
    [loaded] = any_store.load([key])
    assert (loaded.attempts, loaded.max_attempts, loaded.prompt, loaded.job_params) == (2, 2, "a", {"max_tokens": 3})
    any_store.bury([key])
    [row] = read_results(any_store.database, job)
    assert "its worker died 2 times" in row["error"]
    any_store.commit([answer(key)], worker="slow", model="m")
    assert counts(any_store, job) == {DONE: 1}


def test_submitting_again_adds_what_is_missing(any_store: JobStore, tmp_path: Path) -> None:
    class Failing:
        def __init__(self) -> None:
            self.sent: list[Key] = []

        def publish(self, tickets: list[tuple[Key, int]]) -> None:
            if not self.sent:
                self.sent += [key for key, _ in tickets[:2]]
                raise BurnishError("the broker went away")
            self.sent += [key for key, _ in tickets]

    rows = [f"p{number}" for number in range(5)]
    publisher = Failing()
    with pytest.raises(BurnishError, match=r"the broker went away\. Job again is there in part: .* --job again"):
        submit(any_store, tmp_path, rows, publisher=publisher, job_id="again")
    assert any_store.depth("default").unpublished == 5
    submit(any_store, tmp_path, rows, publisher=publisher, job_id="again")
    assert set(publisher.sent) == {Key("again", number) for number in range(5)}
    assert (any_store.depth("default").pending, any_store.depth("default").unpublished) == (5, 0)
    with pytest.raises(ConfigError, match="there is a job again already"):
        submit(any_store, tmp_path, ["other"], job_id="again")
    with pytest.raises(ConfigError, match="there is a job again already"):
        submit(any_store, tmp_path, rows, job_id="again", max_attempts=9)


def test_names_differ_by_case_and_results_by_job(any_store: JobStore, tmp_path: Path) -> None:
    for name in ("job", "JOB"):
        submit(any_store, tmp_path, [f"of {name}"], job_id=name)
    any_store.commit([answer(Key("JOB", 0))], worker="w", model="m")
    assert counts(any_store, "job") == {PENDING: 1}
    assert [job.job_id for job in any_store.jobs()] == ["JOB", "job"]


def test_retry_forgets_results_of_the_states_asked_for(any_store: JobStore, tmp_path: Path) -> None:
    job = submit(any_store, tmp_path, ["a", "b", "c"])
    any_store.commit([answer(Key(job, 0)), Outcome(key=Key(job, 1), error="no")], worker="w", model="m")
    any_store.bury([Key(job, 2)])
    assert read_keys(any_store.database, job, (ERROR, DEAD)) == {Key(job, 1), Key(job, 2)}
    assert any_store.reset(job, (ERROR, DEAD)) == 2
    assert counts(any_store, job) == {DONE: 1, PENDING: 2}
    any_store.commit([answer(Key(job, 1), "now")], worker="w", model="m")
    assert [row["text"] for row in read_results(any_store.database, job)] == ["answer", "now"]


def test_claims_do_not_overlap_and_follow_priority(any_store: JobStore, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "priority": ("low", "normal", "high")[number % 3]} for number in range(30)]
    job = submit(any_store, tmp_path, rows)
    consumers = [
        LeasingConsumer(any_store.database, queue="default", worker=f"w{number}", lease_s=60) for number in range(3)
    ]
    first = consumers[0].take(5, timeout_s=0)
    assert [delivery.key for delivery in first] == [Key(job, number) for number in (2, 5, 8, 11, 14)]
    with ThreadPoolExecutor(3) as pool:
        taken = list(pool.map(lambda consumer: [consumer.take(4, timeout_s=0) for _ in range(4)], consumers))
    keys = [d.key for d in first] + [d.key for batches in taken for batch in batches for d in batch]
    assert len(keys) == len(set(keys)) == 30


def test_lapsed_lease_gives_items_to_others_and_renewing_keeps_them(any_store: JobStore, tmp_path: Path) -> None:
    job = submit(any_store, tmp_path, ["a", "b"])
    database = any_store.database
    silent = LeasingConsumer(database, queue="default", worker="silent", lease_s=0.3)
    alive = LeasingConsumer(database, queue="default", worker="alive", lease_s=0.3)
    [lost] = silent.take(1, timeout_s=0)
    [kept] = alive.take(1, timeout_s=0)
    time.sleep(0.4)
    alive._lease_s = 60.0
    alive.renew()
    other = LeasingConsumer(database, queue="default", worker="other", lease_s=60)
    assert [delivery.key for delivery in other.take(5, timeout_s=0)] == [lost.key]
    silent.renew()
    assert not silent.is_current(lost)
    assert alive.is_current(kept)
    # What the silent one still does changes nothing for the other but that the item is done.
    silent.release([lost])
    assert counts(any_store, job) == {"running": 2}
    alive.close()
    assert counts(any_store, job) == {"running": 1, PENDING: 1}


def test_transactions_wait_for_a_database_that_restarts(mariadb: object, tmp_path: Path) -> None:
    database = Database(mariadb.url, patience_s=300.0)  # type: ignore[attr-defined]
    database.open()
    store = JobStore(database)
    job = submit(store, tmp_path, [f"p{number}" for number in range(30)], job_id=f"restart{time.time_ns()}")
    restarting = threading.Thread(target=mariadb.restart)  # type: ignore[attr-defined]
    restarting.start()
    for number in range(30):
        store.begin([Key(job, number)], worker="w")
        store.commit([answer(Key(job, number))], worker="w", model="m")
        time.sleep(0.01)
    restarting.join()
    rows = list(read_results(database, job))
    assert len(rows) == 30
    # A commit whose answer was lost is repeated; its attempt counts once.
    assert {row["attempts"] for row in rows} == {1}
    database.close()


def test_tables_are_made_once_by_many_at_the_same_time(any_store: JobStore) -> None:
    from burnish.scale.tables import metadata

    any_store.database.write(metadata.drop_all)
    url = any_store.database.url.render_as_string(hide_password=False).replace("+pymysql", "").replace("+psycopg", "")

    def use(_: int) -> int:
        database = Database(url.replace("+pysqlite", ""), patience_s=300.0)
        database.open()
        database.close()
        return 1

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(use, range(4))) == 4
    assert any_store.jobs() == []


def test_worker_notes_are_renewed_and_shown(any_store: JobStore) -> None:
    for finished in (1, 5):
        write_note(
            any_store.database, name="w", queue="default", model="m", state="working", running=2, finished=finished
        )
    [note] = read_notes(any_store.database, queue="default")
    assert (note.name, note.finished, note.silent_s < 30) == ("w", 5, True)
    assert read_notes(any_store.database, queue="other") == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "folder/",
        "oracle://host/db",
        "mysql://host",
        "sqlite://",
        "sqlite:///:memory:",
        "mysql://h:99999/x",
        "mysql://[::bad/x",
    ],
)
def test_store_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--store"):
        parse_url(text)


def test_file_that_changes_while_it_is_read_is_told(store: JobStore, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", ["a", "b"])
    adding = store.add_job

    def add_job(job: Job) -> Job:
        write_prompts(file, ["a", "b", "c"])
        return adding(job)

    store.add_job = add_job  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"p\.jsonl changed while it was read; got 3 prompts; expected 2"):
        submit_file(store, NoPublisher(), file, source="p.jsonl", queue="default", params={}, job_id="changed")
    assert not store.job("changed").complete


@pytest.mark.parametrize("kind", ["mysql", "postgresql"])
def test_options_of_the_url_go_before_ours_and_unknown_ones_are_told(kind: str) -> None:
    pytest.importorskip({"mysql": "pymysql", "postgresql": "psycopg"}[kind])
    database = Database(f"{kind}://me:secret@127.0.0.1:1/x?no_such_option=1", patience_s=30.0)
    with pytest.raises(ConfigError, match="no_such_option") as caught:
        database.open()
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("option", ["no_such_option=1", "timeout=abc"])
def test_option_that_sqlite_would_ignore_is_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it has an option that is not usable"):
        Database(f"sqlite:///{tmp_path / 'q.db'}?{option}", patience_s=1.0)


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ('connection to server on socket "/run/.s.PGSQL.5432" failed: No such file or directory', True),
        ("failed to resolve host 'db': Name or service not known", True),
        ('FATAL: database "x" does not exist', False),
        ('FATAL: password authentication failed for user "x"', False),
    ],
)
def test_server_that_starts_again_is_waited_for_and_a_wrong_name_is_not(said: str, passes: bool) -> None:
    psycopg = pytest.importorskip("psycopg")
    error = sql.exc.OperationalError("connect", None, psycopg.OperationalError(said))
    assert _may_pass(error, "postgresql") is passes


def test_empty_table_is_looked_at_ever_more_rarely(store: JobStore, tmp_path: Path) -> None:
    consumer = LeasingConsumer(store.database, queue="default", worker="w", lease_s=60)
    for _ in range(8):
        assert consumer.take(1, timeout_s=0) == []
    assert consumer._pause_s == 0.5
    submit(store, tmp_path, ["a"])
    assert len(consumer.take(1, timeout_s=60.0)) == 1
    assert consumer._pause_s == 0.0


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    database = Database("postgresql://me:secret@127.0.0.1:1/x?connect_timeout=1", patience_s=0.2)
    with pytest.raises(BurnishError) as caught:
        database.open()
    assert "secret" not in caught.value.message
    assert "cannot be made" in caught.value.message
    nowhere = Database(f"sqlite:///{tmp_path}/no/folder.db", patience_s=30.0)
    with pytest.raises(ConfigError, match="unable to open"):
        nowhere.open()


def test_items_of_a_worker_that_is_gone_are_known(any_store: JobStore, tmp_path: Path) -> None:
    name = submit(any_store, tmp_path, ["a", "b", "c"], job_id="held")
    any_store.begin([Key(name, 0), Key(name, 1)], worker="gone")
    write_note(any_store.database, name="gone", queue="default", model="m", state="working", running=9, finished=0)
    notes = read_notes(any_store.database)
    assert held_by(any_store.database, notes) == {"gone": 2}
    assert any_store.unfinished() == {"default": 3}
    any_store.commit(
        [Outcome(key=Key(name, 0), error="e"), Outcome(key=Key(name, 1), error="e")], worker="w", model="m"
    )
    assert held_by(any_store.database, notes) == held_by(any_store.database, []) == {}
    assert any_store.unfinished() == {"default": 1}
