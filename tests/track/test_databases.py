"""MLflow's databases without its server: one that is restarted, one that somebody else has locked; artifacts on S3."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from tracked_runs import check_model, check_whole, result_hash, state_of, tuned, until

from burnish.track.destination import parse_destination
from burnish.track.mlflow_api import Mlflow
from burnish.track.replay import replay

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables, which take a while to make."""
    pytest.importorskip("mlflow", reason="the extra track brings it")
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    place = parse_destination(f"sqlite:///{path}")
    Mlflow(place).experiment(place)
    return path


def test_mariadb_that_is_restarted_misses_and_doubles_nothing(
    mariadb: Any, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    tuned(tiny, rows_file, tmp_path / "plain", None)
    uri, out = f"{mariadb.url}?experiment=restarted&wait=0&artifacts={tmp_path / 'files'}", tmp_path / "out"
    place = parse_destination(uri)
    Mlflow(place).experiment(place)

    def at_step(step: int) -> None:
        if step == 3:
            until(lambda: state_of(out, uri).runs)
            mariadb.kill()
        elif step == 6:
            until(lambda: state_of(out, uri).failures)
            mariadb.start()
        elif step == 8:
            until(lambda: state_of(out, uri).failures == 0)
            mariadb.kill()

    tuned(tiny, rows_file, out, uri, at_step=at_step, say=lambda line: None)
    mariadb.start()
    assert result_hash(out) == result_hash(tmp_path / "plain")
    assert replay(out)[0].sent > 0
    check_model(out, uri, "restarted-out")
    mariadb.restart()
    assert replay(out)[0].sent == 0
    check_model(out, uri, "restarted-out")


def test_sqlite_that_another_has_locked_gets_it_later(
    database: Path, tiny: Path, rows_file: Path, tmp_path: Path
) -> None:
    tuned(tiny, rows_file, tmp_path / "plain", None)
    uri, out = f"sqlite:///{database}?experiment=locked&wait=0", tmp_path / "out"
    other = sqlite3.connect(database, isolation_level=None)

    def at_step(step: int) -> None:
        if step == 2:
            until(lambda: state_of(out, uri).runs)
            other.execute("BEGIN EXCLUSIVE")
        elif step == 4:
            until(lambda: state_of(out, uri).failures)

    try:
        tuned(tiny, rows_file, out, uri, at_step=at_step, say=lambda line: None)
        assert result_hash(out) == result_hash(tmp_path / "plain")
        assert "locked" in (state_of(out, uri).error or "")
        other.execute("COMMIT")
        assert replay(out)[0].sent > 0
        check_whole(out, uri)
        assert replay(out)[0].sent == 0
    finally:
        other.close()


def test_artifacts_and_model_arrive_on_s3(
    s3: Any, database: Path, tiny: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3 = pytest.importorskip("boto3", reason="the extra track brings it")
    for name, value in s3.credentials.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="tracked")
    uri, out = f"sqlite:///{database}?experiment=bucket&wait=0&artifacts=s3://tracked/runs", tmp_path / "out"
    tuned(tiny, rows_file, out, uri, say=lambda line: None)
    replay(out)
    name = check_model(out, uri, "bucket-out")
    keys = {one["Key"]: one["Size"] for one in client.list_objects_v2(Bucket="tracked")["Contents"]}
    weights = [key for key in keys if key.endswith("/adapter_model.safetensors")]
    assert [keys[key] for key in weights] == [(out / "adapter_model.safetensors").stat().st_size]
    (manifest,) = (key for key in keys if key.endswith("/artifacts/burnish.json"))
    there = client.generate_presigned_url("get_object", Params={"Bucket": "tracked", "Key": manifest})
    assert urlopen(there, timeout=60).read() == (out / "burnish.json").read_bytes()
    assert name == "models:/bucket-out/1"
    client.close()
