"""What an MLflow URI of --track says, and what is kept of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.errors import ConfigError, MissingExtraError
from burnish.track.destination import default_artifacts, is_mlflow, parse_destination
from burnish.track.making import make_tracker


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://host:5000", "http://host:5000"),
        ("https://host/mlflow/", "https://host/mlflow"),
        ("mlflow+http://host:5000?run=a", "http://host:5000"),
        ("mlflow+https://host", "https://host"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("mysql://u:p@host/db?charset=utf8mb4&run=a", "mysql+pymysql://u:p@host/db?charset=utf8mb4"),
        ("mysql+pymysql://host/db", "mysql+pymysql://host/db"),
        ("postgresql://host/db", "postgresql+psycopg://host/db"),
    ],
)
def test_uri_is_as_mlflow_takes_it(uri: str, expected: str) -> None:
    assert is_mlflow(uri)
    assert parse_destination(uri).uri == expected


def test_relative_sqlite_file_is_one_file_from_wherever_it_is_sent() -> None:
    assert parse_destination("sqlite:///runs/m.db").uri == f"sqlite:///{Path('runs/m.db').absolute()}"


def test_names_are_chosen_in_the_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = parse_destination("http://host")
    assert (plain.experiment, plain.run, plain.model, plain.wait_s) == ("burnish", None, None, 30.0)
    uri = "http://host?experiment=my%20sql&run=first&model=sql&artifacts=s3://bucket/a&wait=5&system=0"
    chosen = parse_destination(uri)
    assert (chosen.experiment, chosen.run, chosen.model) == ("my sql", "first", "sql")
    assert (chosen.artifacts, chosen.wait_s, chosen.system_s) == ("s3://bucket/a", 5.0, 0.0)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from-there")
    assert parse_destination("http://host").experiment == "from-there"
    assert parse_destination(uri).experiment == "my sql"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:1")
    assert parse_destination("mlflow").uri == "http://elsewhere:1"


@pytest.mark.parametrize(
    "uri", ["http://u:secret@host", "mysql://u:secret@host/db?experiment=a&run=b", "sqlite:////a/b"]
)
def test_what_is_stored_names_the_same_place_without_a_password(uri: str) -> None:
    given = parse_destination(uri)
    assert "secret" not in given.stored + given.shown
    again = parse_destination(given.stored)
    assert again.uri == given.shown
    assert (again.name, again.experiment, again.run) == (given.name, given.experiment, given.run)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://host?experimet=a", "Did you mean experiment"),
        ("http://host?experiment=", "empty"),
        ("http://host?wait=long", "wait"),
        ("http://host?system=-1", "system"),
        ("http://", "no place"),
        ("http://host:port", "malformed"),
        ("mysql:///db", "no place"),
        ("sqlite:///", "no file"),
        ("sqlite://m.db", "no file"),
        ("mlflow", "MLFLOW_TRACKING_URI"),
    ],
)
def test_uri_at_fault_is_refused_before_the_run(uri: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_tracker(uri)


@pytest.mark.parametrize("uri", ["wandb://project", "ftp://host", "t.jsonl", ""])
def test_replay_goes_to_mlflow_alone(uri: str) -> None:
    with pytest.raises(ConfigError, match="names no MLflow"):
        parse_destination(uri)


def test_missing_package_is_known_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"burnish\[track\]"):
        make_tracker("http://host")


def test_files_of_a_database_without_a_server_are_beside_it() -> None:
    assert default_artifacts(parse_destination("sqlite:////a/m.db")) == "file:///a/mlartifacts"
    assert default_artifacts(parse_destination("http://host")) is None
    assert default_artifacts(parse_destination("http://host?artifacts=s3://b/c")) == "s3://b/c"
