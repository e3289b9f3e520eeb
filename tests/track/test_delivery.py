"""From a spool to a server: nothing missing and nothing twice, wherever it breaks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from fake_mlflow import FakeMlflow, FakeRun, Lost

from burnish.track import delivery as delivering
from burnish.track.delivery import Delivery
from burnish.track.destination import Destination, parse_destination
from burnish.track.jsonl import read_runs
from burnish.track.spool import EVENTS_NAME, SpoolWriter, read_state

PLACE = parse_destination("http://127.0.0.1:1")


class Clock:
    """A second for every line."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        self.now_s += 1
        return self.now_s


def spool_of(folder: Path, *, steps: int = 7, end: bool = True) -> SpoolWriter:
    """A run with a part within it, files and all."""
    writer = SpoolWriter(folder / "spool", clock=Clock())
    writer.open({"key": "k" * 32, "destination": PLACE.stored})
    writer.write("start", "run", name="whole", parent=None)
    writer.write("params", "run", params={"model": "m", "rank": 4})
    writer.write("start", "run/tune", name="tune", parent="run")
    for step in range(1, steps + 1):
        writer.write("metrics", "run/tune", step=step, metrics={"loss": 1 / step, "rate": 2.0 * step})
        writer.write("metrics", "run", step=step, metrics={"system/memory": 3.0})
    (folder / "made.json").write_text("{}")
    writer.write("artifact", "run/tune", path=str(folder / "made.json"), kept=writer.keep(folder / "made.json"))
    (folder / "made.json").unlink()
    writer.write("metrics", "run/tune", step=None, metrics={"seconds": 2.5, "worst": math.inf, "none": math.nan})
    if end:
        writer.write("finish", "run/tune", status="finished")
        writer.write("finish", "run", status="finished")
        writer.close()
    return writer


def deliver(spool: Path, server: FakeMlflow, *, compare: bool = False) -> Delivery:
    """One process's attempt, which ends with the first failure."""
    sending = Delivery(spool, PLACE, compare=compare, open_client=server)
    while sending.advance():
        pass
    return sending


def check_whole(server: FakeMlflow, spool: Path) -> None:
    """The server has each run once, and each figure once, as the spool has them."""
    runs = {run.tags[delivering.KEY_TAG].partition("/")[2]: run for run in server.active}
    assert len(runs) == len(server.active)
    local = {run.name: run for run in read_runs(spool / EVENTS_NAME) if run.name}
    assert runs.keys() == local.keys()
    for name, run in local.items():
        told = [(step or 0, values) for step, values in run.metrics]
        expected = [(key, step, str(value)) for step, values in told for key, value in values.items()]
        there = [(key, step, "inf" if value > 1e308 else str(value)) for key, value, _, step in runs[name].metrics]
        assert sorted(there) == sorted(expected)
        assert runs[name].params == {key: str(value) for key, value in run.params.items()}
        assert runs[name].status == "FINISHED"
    part = runs["run/tune"]
    assert part.files == [("made.json", b"{}")]
    parent = next(key for key, run in server.runs.items() if run is runs["run"])
    assert part.tags["mlflow.parentRunId"] == parent


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivering, "_MOST_METRICS", 4)


def test_everything_arrives_once(tmp_path: Path) -> None:
    spool, server = spool_of(tmp_path).folder, FakeMlflow()
    sent = deliver(spool, server)
    assert sent.is_whole
    check_whole(server, spool)
    again = deliver(spool, server)
    assert again.num_sent == 0
    replayed = deliver(spool, server, compare=True)
    assert replayed.num_sent == 0
    assert replayed.num_there == sent.num_sent
    check_whole(server, spool)


@pytest.mark.parametrize("mode", ["before", "after"])
@pytest.mark.parametrize("compare", [False, True])
def test_a_break_at_any_call_loses_and_doubles_nothing(
    tmp_path: Path, small_batches: None, mode: str, compare: bool
) -> None:
    (tmp_path / "count").mkdir()
    server = FakeMlflow()
    deliver(spool_of(tmp_path / "count").folder, server, compare=compare)
    for number in range(1, server.calls + 1):
        (tmp_path / str(number)).mkdir()
        spool, broken = spool_of(tmp_path / str(number)).folder, FakeMlflow()
        broken.fail = {number: mode}
        with pytest.raises(Lost):
            deliver(spool, broken, compare=compare)
        deliver(spool, broken, compare=compare)
        check_whole(broken, spool)


def test_breaks_one_after_another_lose_and_double_nothing(tmp_path: Path, small_batches: None) -> None:
    spool, server = spool_of(tmp_path, steps=30).folder, FakeMlflow()
    server.fail = {number: ("before", "after")[number % 2] for number in range(1, 400, 3)}
    sending = Delivery(spool, PLACE, compare=False, open_client=server)
    failures = 0
    while True:
        try:
            if not sending.advance():
                break
        except Lost:
            failures += 1
            assert read_state(spool, PLACE.name).failures > 0
    assert failures > 10
    check_whole(server, spool)
    assert read_state(spool, PLACE.name).failures == 0


def test_run_that_two_requests_made_is_kept_once(tmp_path: Path) -> None:
    spool, server = spool_of(tmp_path).folder, FakeMlflow()
    key = f"{'k' * 32}/run"
    for number in range(2):
        server.runs[f"early{number}"] = FakeRun("whole", {delivering.KEY_TAG: key}, number)
    deliver(spool, server)
    assert [run.deleted for run in server.runs.values()] == [False, True, False]
    check_whole(server, spool)


def test_lines_are_sent_while_the_run_lasts(tmp_path: Path) -> None:
    writer, server = spool_of(tmp_path, end=False), FakeMlflow()
    sending = Delivery(writer.folder, PLACE, compare=False, open_client=server)
    assert sending.advance()
    assert sending.is_whole
    writer.write("metrics", "run", step=9, metrics={"system/memory": 4.0})
    assert not sending.is_whole
    assert sending.advance()
    assert not sending.advance()
    writer.write("finish", "run/tune", status="finished")
    writer.write("finish", "run", status="finished")
    writer.close()
    sending.advance()
    check_whole(server, writer.folder)


def test_line_that_a_crash_cut_is_passed_over(tmp_path: Path) -> None:
    writer, server = spool_of(tmp_path, end=False), FakeMlflow()
    writer.close()
    with (writer.folder / EVENTS_NAME).open("ab") as file:
        file.write(b'{"event":"metrics","run":"run","time":1,"met')
    sending = Delivery(writer.folder, PLACE, compare=False, open_client=server)
    while sending.advance():
        pass
    sending.end_abandoned()
    assert {run.status for run in server.active} == {"FAILED"}
    resumed = SpoolWriter(writer.folder, clock=Clock())
    resumed.open(None)
    resumed.write("resume", "run", name="whole", parent=None)
    resumed.write("finish", "run/tune", status="finished")
    resumed.write("finish", "run", status="finished")
    resumed.close()
    deliver(writer.folder, server)
    check_whole(server, writer.folder)


def test_what_the_server_refuses_is_named_and_the_rest_arrives(tmp_path: Path) -> None:
    writer, server = SpoolWriter(tmp_path / "s"), FakeMlflow()
    writer.open({"key": "a", "destination": PLACE.stored})
    writer.write("start", "run", name="x", parent=None)
    writer.write("params", "run", params={"good": 1, "bad": 2})
    writer.write("metrics", "run", step=1, metrics={"fine": 1.0, "bad": 2.0})
    writer.close()
    sent = deliver(writer.folder, server)
    assert [line.partition(":")[0] for line in sent.state.refused] == ["metrics bad", "params bad"]
    (run,) = server.active
    assert run.params == {"good": "1"}
    assert [metric[0] for metric in run.metrics] == ["fine"]


def test_setting_that_changed_is_kept_beside_the_first(tmp_path: Path) -> None:
    writer, server = SpoolWriter(tmp_path / "s"), FakeMlflow()
    writer.open({"key": "a", "destination": PLACE.stored})
    writer.write("start", "run", name="x", parent=None)
    writer.write("params", "run", params={"steps": 10})
    deliver(writer.folder, server)
    writer.write("params", "run", params={"steps": 20, "too long": "x" * 9000})
    writer.close()
    sent = deliver(writer.folder, server)
    assert not sent.state.refused
    (run,) = server.active
    assert run.params["steps"] == "10"
    assert run.tags["later.steps"] == "20"
    assert len(run.params["too long"]) == 6000


def test_server_that_lost_everything_gets_it_again(tmp_path: Path) -> None:
    class Gone(Exception):
        error_code = "RESOURCE_DOES_NOT_EXIST"

    writer, server = spool_of(tmp_path, end=False), FakeMlflow()
    deliver(writer.folder, server)
    server.runs.clear()
    writer.write("finish", "run/tune", status="finished")
    writer.write("finish", "run", status="finished")
    writer.close()
    (tmp_path / "made.json").write_text("{}")

    def lookup(run_id: str) -> Any:
        if run_id not in server.runs:
            raise Gone(run_id)

    def client(destination: Destination) -> Any:
        made = server(destination)
        ended = made.has_ended
        made.__dict__["has_ended"] = lambda run_id, *rest: lookup(run_id) or ended(run_id, *rest)
        return made

    sending = Delivery(writer.folder, PLACE, compare=False, open_client=client)
    with pytest.raises(Gone):
        sending.advance()
    while sending.advance():
        pass
    check_whole(server, writer.folder)


def test_file_that_is_gone_is_named(tmp_path: Path) -> None:
    writer, server = SpoolWriter(tmp_path / "s"), FakeMlflow()
    writer.open({"key": "a", "destination": PLACE.stored})
    writer.write("start", "run", name="x", parent=None)
    writer.write("artifact", "run", path=str(tmp_path / "lost.json"), kept="files/1/lost.json")
    writer.close()
    assert deliver(writer.folder, server).missing == [str(tmp_path / "lost.json")]
