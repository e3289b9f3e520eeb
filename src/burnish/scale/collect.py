"""Results of a job in the order of its prompts, a page at a time, as JSON lines or Parquet, to a file or to S3."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from burnish._optional import require
from burnish.errors import BurnishError, ConfigError
from burnish.scale.reading import read_results
from burnish.scale.s3 import S3Writer, parse_s3
from burnish.scale.store import JobStore

FORMATS = ("jsonl", "parquet")
_LINES = ("", ".jsonl", ".ndjson", ".txt")  # endings of JSON lines
_ROW_GROUP = 2000


class Sink(Protocol):
    """Where rows go."""

    def write(self, data: bytes, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was written: rows, those among them that are errors, and items left out as they are unfinished."""

    job_id: str
    out: str
    rows: int
    errors: int
    unfinished: int


def format_of(out: str, asked: str | None) -> str:
    """The format to write, by the ending where none is asked for.

    Raises:
        ConfigError: there is no such format, or no known ending.
    """
    ending = Path(out).suffix.lower()
    if asked is None and ending != ".parquet" and ending not in _LINES:
        known = ".jsonl, .ndjson or .parquet"
        remedy = "With --format jsonl, results go into a file of any name."
        raise ConfigError(f"--out {out} has no ending that is known", expected=known, remedy=remedy)
    name = asked or ("parquet" if ending == ".parquet" else "jsonl")
    if name not in FORMATS:
        raise ConfigError("there is no such format", got=name, expected=" or ".join(FORMATS))
    if name == "parquet":
        require("pyarrow.parquet", extra="data")
        if out == "-":
            raise ConfigError("Parquet cannot be written to stdout", remedy="Name a file with --out.")
    return name


def wait_for(store: JobStore, job_id: str, *, progress: Callable[[int, int], None], every_s: float = 0.5) -> None:
    """Return when no item of the job waits or runs any more."""
    job = store.job(job_id)
    while True:
        left = store.counts([job.job_id])[job.job_id].unfinished
        progress(job.num_items - left, job.num_items)
        if not left and store.job(job_id).complete:
            return
        time.sleep(every_s)


def collect(
    store: JobStore, job_id: str, *, out: str, form: str, partial: bool = False, overwrite: bool = False
) -> Collected:
    """Write a job's results; what is written appears whole or not at all.

    Args:
        out: a file, s3://BUCKET/KEY, or - for stdout.
        form: one of `FORMATS`.
        partial: leave unfinished items out instead of refusing.
        overwrite: replace a file that is there.

    Raises:
        ConfigError: there is no such job, or `out` cannot be written to (see `check_out`).
        BurnishError: the job is not finished.
    """
    check_out(out, overwrite=overwrite)
    job = store.job(job_id)
    left = store.counts([job.job_id])[job.job_id].unfinished
    if not job.complete:
        raise BurnishError(
            f"job {job_id} is only partly submitted", remedy=f"Submit it again with --job {job_id}, then collect."
        )
    if left and not partial:
        raise BurnishError(
            f"job {job_id} is not finished: {left} of {job.num_items} items are still to be done",
            remedy="Add --wait, or --partial to leave them out.",
        )
    rows = errors = 0
    with _opened(out) as sink:
        write = _write_parquet if form == "parquet" else _write_lines

        def counted() -> Iterator[dict[str, Any]]:
            nonlocal rows, errors
            for row in read_results(store.database, job.job_id):
                rows += 1
                errors += row["error"] is not None
                yield row

        write(sink, counted())
    return Collected(job_id=job.job_id, out=out, rows=rows, errors=errors, unfinished=job.num_items - rows)


def _write_lines(sink: Sink, rows: Iterator[dict[str, Any]]) -> None:
    for row in rows:
        line = {key: value for key, value in row.items() if value is not None or key == "text"}
        sink.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def _write_parquet(sink: Sink, rows: Iterator[dict[str, Any]]) -> None:
    """Columns are the same for every job; what only some parameters bring is JSON in `details`."""
    arrow = require("pyarrow", extra="data")
    parquet = require("pyarrow.parquet", extra="data")
    kinds = {"item": arrow.int64(), "attempts": arrow.int32(), "prompt_tokens": arrow.int64()}
    kinds |= {"output_tokens": arrow.int64(), "ttft_ms": arrow.float64(), "e2e_ms": arrow.float64()}
    texts = ("id", "text", "finish_reason", "error", "model", "details")
    order = ("item", "id", "text", "finish_reason", "error", "prompt_tokens", "output_tokens", "ttft_ms", "e2e_ms")
    names = (*order, "attempts", "model", "details")
    schema = arrow.schema([(name, arrow.string() if name in texts else kinds[name]) for name in names])
    with parquet.ParquetWriter(arrow.PythonFile(sink, mode="w"), schema, compression="zstd") as writer:
        page: list[dict[str, Any]] = []
        for row in rows:
            extra = {key: value for key, value in row.items() if key not in names}
            flat = {name: row.get(name) for name in names}
            page.append(flat | {"details": json.dumps(extra, ensure_ascii=False) if extra else None})
            if len(page) == _ROW_GROUP:
                writer.write_table(arrow.Table.from_pylist(page, schema=schema))
                page = []
        if page:
            writer.write_table(arrow.Table.from_pylist(page, schema=schema))


def check_out(out: str, *, overwrite: bool) -> None:
    """Say what is wrong with a place to write to before there is anything to write.

    Raises:
        ConfigError: it is malformed, there already, no file, or in no folder.
    """
    if out == "-":
        return
    if out.startswith("s3://"):
        parse_s3(out)
        return
    if os.path.exists(out) and not os.path.isfile(out):
        raise ConfigError(f"--out {out} is no file", expected="a file, s3://BUCKET/KEY, or - for stdout")
    if os.path.exists(out) and not overwrite:
        raise ConfigError(f"--out {out} is there already", remedy="Choose another file, or add --overwrite.")
    if not os.path.isdir(Path(out).parent):
        raise ConfigError(f"--out {out} cannot be written to", got=f"no folder {Path(out).parent}")


@contextmanager
def _opened(out: str) -> Iterator[Any]:
    if out == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    elif out.startswith("s3://"):
        sink = S3Writer(out)
        try:
            yield sink
            sink.finish()
        except BaseException:
            with suppress(BurnishError):  # what happened first is what people have to know
                sink.abort()
            raise
    else:
        with _file(Path(out)) as sink:
            yield sink


@contextmanager
def _file(path: Path) -> Iterator[Any]:
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written to", got=error.strerror or error) from error
    finally:
        with suppress(OSError):
            part.unlink()
