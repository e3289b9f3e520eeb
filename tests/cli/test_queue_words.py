"""What `burnish queue` tells people: whole names in tables, workers that are gone, jobs and queues that are there."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from command_line import Cli

from burnish.scale.database import Database
from burnish.scale.items import Key
from burnish.scale.store import JobStore, Outcome
from burnish.scale.worker_book import write_note

JOB = "20261121-101112-abcdef"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\nthree\n")
    return file


def test_tables_are_whole_and_end_with_their_text(cli: Cli, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    cli("queue", "submit", prompts, "--job", JOB)
    job = next(line for line in cli("queue", "status").out.splitlines() if line.startswith(JOB))
    assert job.split()[:4] == [JOB, "default", "3", "3"]
    assert re.search(r" \d\d-\d\d \d\d:\d\d$", job)
    assert len(job) <= 80
    assert all(line == line.rstrip() for line in cli("queue", "status").out.splitlines())


def test_worker_that_is_gone_is_silent_and_keeps_nothing(
    cli: Cli, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("queue", "submit", prompts, "--job", "a", "--queue", "one")
    cli("queue", "submit", prompts, "--job", "b", "--queue", "two")
    database = Database("sqlite:///burnish-queue.db", patience_s=300.0)
    store = JobStore(database)
    store.begin([Key("a", 0), Key("a", 1)], worker="gone")
    monkeypatch.setattr(Database, "now_s", lambda self: time.time() - 70)
    write_note(database, name="gone", queue="one", model="m", state="working", running=9, finished=4)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)

    def shown(*job: str) -> list[tuple[str, int]]:
        return [(each["state"], each["running"]) for each in cli("queue", "status", *job, "--json").json["workers"]]

    assert shown("a") == shown() == [("silent", 2)]
    assert "silent for 7" in cli("queue", "status", "a").out
    assert shown("b") == []
    store.commit([Outcome(key=Key("a", 0), error="e"), Outcome(key=Key("a", 1), error="e")], worker="w", model="m")
    assert shown("a") == [("silent", 0)]
    database.close()


def test_job_that_is_there_already_is_said_to_be(cli: Cli, prompts: Path) -> None:
    assert "3 items in queue default; see" in cli("queue", "submit", prompts, "--job", "same").err
    assert "job same is there already, 3 items in queue default; nothing was added" in (
        cli("queue", "submit", prompts, "--job", "same").err
    )


def test_file_that_cannot_be_read_makes_no_queue(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for name, part in (("none.jsonl", "there is no file"), ("empty.jsonl", "holds no prompts")):
        cli("queue", "submit", name).fails(2, part)
    assert not list(tmp_path.glob("*.db"))


def test_queue_without_items_names_those_that_have_some(cli: Cli, tiny: Path, prompts: Path) -> None:
    cli("queue", "submit", prompts, "--queue", "sql")
    done = cli("queue", "work", tiny, "--queue", "nosuch", "--until-empty")
    assert (done.code, "queue nosuch has nothing to do; these have: sql (3 items)" in done.err) == (0, True), done.err
    assert "nothing to do" not in cli("queue", "work", tiny, "--queue", "sql", "--until-empty").err


def test_bias_of_a_row_is_used(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "SELECT", "params": {"logit_bias": {"100": 100}, "max_tokens": 3, "ignore_eos": True}}]
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]) + "\n")
    job = cli("queue", "submit", "p.jsonl").out.strip()
    assert cli("queue", "work", tiny, "--until-empty", "--json").json["errors"] == 0
    cli("queue", "collect", job, "--out", "out.csv").fails(2, "has no ending that is known", "--format jsonl")
    assert cli("queue", "collect", job, "--out", "out.csv", "--format", "jsonl").code == 0
    [answer] = (json.loads(line) for line in (tmp_path / "out.csv").read_text().splitlines())
    assert (answer.get("error"), answer["output_tokens"]) == (None, 3)
