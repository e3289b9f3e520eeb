"""Results in order, to files and to S3 over HTTP, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from queue_fakes import submit

from burnish.errors import BurnishError, ConfigError
from burnish.scale import collect as collecting
from burnish.scale import reading, s3
from burnish.scale.collect import collect, format_of, wait_for
from burnish.scale.items import Key
from burnish.scale.store import JobStore, Outcome


@pytest.fixture
def job(store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Seven finished items, stored out of order, over several pages; one error, one dead, one with choices."""
    monkeypatch.setattr(reading, "_PAGE", 3)
    monkeypatch.setattr(collecting, "_ROW_GROUP", 2)
    rows = [{"prompt": f"p{number}", "id": f"r{number}"} for number in range(7)]
    name = submit(store, tmp_path, rows, job_id="job")
    outcomes = [
        Outcome(
            key=Key(name, number),
            answer={"text": f"ä{number}", "finish_reason": "stop", "ttft_ms": 1.5, "e2e_ms": 2.0},
            prompt_tokens=3,
            output_tokens=number,
        )
        for number in (6, 0, 3, 1)
    ]
    choices = [{"text": "x"}, {"text": "y"}]
    outcomes.append(Outcome(key=Key(name, 5), answer={"text": "x", "finish_reason": "stop", "choices": choices}))
    outcomes.append(Outcome(key=Key(name, 2), error="too long"))
    store.commit(outcomes, worker="w", model="m")
    store.bury([Key(name, 4)])
    return name


def test_lines_are_in_order_with_errors_in_place(store: JobStore, job: str, tmp_path: Path) -> None:
    record = collect(store, job, out=str(tmp_path / "out.jsonl"), form="jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["item"] for row in rows] == list(range(7))
    assert [row["id"] for row in rows] == [f"r{number}" for number in range(7)]
    assert [row["text"] for row in rows] == ["ä0", "ä1", None, "ä3", None, "x", "ä6"]
    assert (rows[2]["error"], rows[2]["finish_reason"]) == ("too long", "error")
    assert "its worker died 0 times" in rows[4]["error"]
    assert rows[5]["choices"] == [{"text": "x"}, {"text": "y"}]
    assert (record.rows, record.errors, record.unfinished) == (7, 2, 0)


def test_parquet_holds_the_same(store: JobStore, job: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    collect(store, job, out=str(tmp_path / "out.parquet"), form="parquet")
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["text"] for row in rows] == ["ä0", "ä1", None, "ä3", None, "x", "ä6"]
    assert json.loads(rows[5]["details"]) == {"choices": [{"text": "x"}, {"text": "y"}]}
    assert rows[0]["ttft_ms"] == 1.5


def test_file_that_is_there_stays_unless_told(store: JobStore, job: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        collect(store, job, out=str(out), form="jsonl")
    assert out.read_text() == "mine"
    collect(store, job, out=str(out), form="jsonl", overwrite=True)
    assert len(out.read_text().splitlines()) == 7
    with pytest.raises(ConfigError, match="cannot be written to"):
        collect(store, job, out=str(tmp_path / "no" / "folder.jsonl"), form="jsonl")


def test_failure_in_the_middle_leaves_no_file(
    store: JobStore, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> Any:
        yield {"item": 0, "error": None, "text": "a"}
        raise BurnishError("the database went away")

    monkeypatch.setattr(collecting, "read_results", broken)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BurnishError, match="went away"):
        collect(store, job, out=str(tmp_path / "out.jsonl"), form="jsonl")
    assert sorted(tmp_path.iterdir()) == before


def test_unfinished_job_is_refused_or_partly_written(store: JobStore, job: str, tmp_path: Path) -> None:
    store.reset(job, ("error", "dead"))
    with pytest.raises(BurnishError, match="2 of 7 items are still to be done"):
        collect(store, job, out=str(tmp_path / "out.jsonl"), form="jsonl")
    record = collect(store, job, out=str(tmp_path / "out.jsonl"), form="jsonl", partial=True)
    assert (record.rows, record.unfinished) == (5, 2)


def test_waiting_ends_with_the_last_item(store: JobStore, job: str) -> None:
    store.reset(job, ("dead",))
    seen: list[int] = []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        store.commit([Outcome(key=Key(job, 4), error="now")], worker="w", model="m")

    wait_for(store, job, progress=progress, every_s=0.0)
    assert seen == [6, 7]


def test_formats_follow_the_ending() -> None:
    pytest.importorskip("pyarrow")
    assert format_of("a.parquet", None) == "parquet"
    assert format_of("s3://b/a.txt", None) == "jsonl"
    assert format_of("a.csv", "jsonl") == format_of("-", None) == format_of("a", None) == "jsonl"
    for out, asked in (("a", "csv"), ("-", "parquet"), ("a.csv", None), ("s3://b/a.json", None)):
        with pytest.raises(ConfigError):
            format_of(out, asked)
    for url in ("s3://", "s3://bucket", "s3://bucket/", "s3://bucket/folder/", "file"):
        with pytest.raises(ConfigError):
            s3.parse_s3(url)


@pytest.mark.services
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow")
class TestS3:
    @pytest.fixture
    def client(self, s3: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        import boto3

        for name, value in s3.credentials.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="results")
        yield client
        client.close()

    def test_results_arrive_whole(self, store: JobStore, job: str, client: Any, tmp_path: Path) -> None:
        collect(store, job, out="s3://results/folder/out.jsonl", form="jsonl")
        collect(store, job, out=str(tmp_path / "out.jsonl"), form="jsonl")
        body = client.get_object(Bucket="results", Key="folder/out.jsonl")["Body"].read()
        assert body == (tmp_path / "out.jsonl").read_bytes()

    def test_parquet_arrives_whole(self, store: JobStore, job: str, client: Any, tmp_path: Path) -> None:
        parquet = pytest.importorskip("pyarrow.parquet")
        collect(store, job, out="s3://results/out.parquet", form="parquet")
        (tmp_path / "got").write_bytes(client.get_object(Bucket="results", Key="out.parquet")["Body"].read())
        assert parquet.read_table(tmp_path / "got").num_rows == 7

    def test_large_objects_go_in_parts(self, client: Any) -> None:
        data = os.urandom(s3.FIRST_PART_BYTES * 2 + 100)
        writer = s3.S3Writer("s3://results/large")
        for start in range(0, len(data), 1 << 20):
            writer.write(data[start : start + (1 << 20)])
        assert len(writer._parts) == 2
        writer.finish()
        assert client.get_object(Bucket="results", Key="large")["Body"].read() == data

    def test_failure_leaves_no_object_and_no_parts(
        self, store: JobStore, job: str, client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object, **__: object) -> Any:
            yield {"item": 0, "error": None, "text": "a"}
            raise BurnishError("the database went away")

        monkeypatch.setattr(collecting, "read_results", broken)
        with pytest.raises(BurnishError, match="went away"):
            collect(store, job, out="s3://results/broken", form="jsonl")
        assert "broken" not in [row["Key"] for row in client.list_objects_v2(Bucket="results").get("Contents", [])]
        assert "Uploads" not in client.list_multipart_uploads(Bucket="results")

    def test_missing_bucket_is_told(self, store: JobStore, job: str, client: Any) -> None:
        with pytest.raises(BurnishError, match="cannot be written to"):
            collect(store, job, out="s3://nobody/has-this", form="jsonl")

    def test_wrong_endpoint_and_missing_credentials_are_told(
        self, store: JobStore, job: str, client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "nonsense")
        with pytest.raises(BurnishError, match="s3://b/k cannot be written to; got Invalid endpoint"):
            collect(store, job, out="s3://b/k", form="jsonl")
        monkeypatch.setenv("AWS_ENDPOINT_URL", client.meta.endpoint_url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it remembers credentials
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(BurnishError, match="credentials"):
            collect(store, job, out="s3://b/k", form="jsonl")
