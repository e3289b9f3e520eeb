"""What people read: why a place does not take a run, and where the run is to be seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.track.making import make_tracker
from burnish.track.mlflow_api import in_words

POOL = "API request to http://h:5/api failed with exception HTTPConnectionPool(host='h', port=5): Max retries exceeded"


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (f"{POOL} with url: /a (Caused by NewConnectionError('[Errno 111] Connection refused'))", "connection refused"),
        (f"{POOL} (Caused by NameResolutionError(Failed to resolve 'h'))", "no host of this name is known"),
        ("HTTPConnectionPool(host='h', port=5): Read timed out. (read timeout=30)", "no answer in time"),
        ("('Connection aborted.', RemoteDisconnected('closed'))", "the connection broke"),
        ("(OperationalError) (2003, Can't connect ([Errno 111] Connection refused))", "connection refused"),
        ("database is\nlocked", "database is locked"),
        ("", "RuntimeError"),
    ],
)
def test_reason_is_in_words(raised: str, words: str) -> None:
    assert in_words(RuntimeError(raised)) == words


def test_long_reason_ends_with_a_word() -> None:
    said = in_words(RuntimeError("something " * 100))
    assert len(said) <= 300
    assert said.endswith("something ...")


def test_run_in_a_database_is_said_to_be_there(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="the extra track brings it")
    warned: list[str] = []
    said: list[str] = []
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = make_tracker(
        f"{uri}?experiment=e&system=0&wait=1800", beside=tmp_path / "out", warn=warned.append, say=said.append
    )
    tracker.start("run")
    tracker.finish("finished")
    assert warned == []
    (line,) = said
    assert line.startswith("tracked: run ")
    assert line.endswith(f"of experiment e in {uri}; look at it with: mlflow server --backend-store-uri {uri}")
