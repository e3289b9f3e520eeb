"""Raw records of a data set, one at a time: JSON, JSONL, CSV, TSV and Parquet files, and data sets on the hub.

A reader yields a `Record` per row; what a row means is decided in `layouts`. A file that cannot be read somewhere is an
error that names the line: rows are never lost in silence. Files are streamed, so a large one costs
no more memory than its largest row (a JSON object around a list is the exception: it is read whole).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from burnish._optional import require
from burnish.errors import DataError

_CHUNK_CHARACTERS = 1 << 20
_LARGEST_CSV_CELL = 16 << 20
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?\Z")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One raw row.

    Attributes:
        number: where to find it: the line of a JSONL or CSV file, otherwise the position counted from 1.
        value: the row as read.
    """

    number: int
    value: Any = None


def file_records(path: Path) -> Iterator[Record]:
    """Records of a local file, told by its ending: .json, .jsonl, .ndjson, .csv, .tsv, .parquet.

    Raises:
        DataError: there is no such file, its ending is not known, or it is broken as a whole.
        MissingExtraError: a Parquet file, and the data extra is not installed.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder", expected="a data file", remedy="Name one of the files in it")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is of no known kind", got=path.suffix or "no ending", expected=", ".join(_READERS))
    return _guarded(reader, path)


def _guarded(reader: Callable[[Path], Iterator[Record]], path: Path) -> Iterator[Record]:
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text", got=f"{error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read", got=error.strerror or error) from error


def _json_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if raw.strip():
                yield Record(number=number, value=_json_value(raw, number, path))


def _json_value(raw: bytes, number: int, path: Path) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8").strip())
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text in line {number}", got=f"{error.reason} at byte {error.start}"
        ) from error
    except (RecursionError, ValueError) as error:
        problem = str(error)
    raise DataError(
        f"{path} is not valid JSON in line {number}", got=problem, remedy="Mend the line, or take it out of the file."
    )


def _json(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        head = _first_character(file)
        file.seek(0)
        if head == "[":
            yield from _json_array(file, path)
            return
        if head != "{":
            raise DataError(f"{path} holds no JSON rows", got=repr(head) if head else "an empty file")
        try:
            whole = json.load(file)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # one object after the other: JSONL under another name
                raise DataError(
                    f"{path} is not valid JSON", got=f"{error.msg} at line {error.lineno}, column {error.colno}"
                ) from error
            whole = None
    if whole is None:
        yield from _json_lines(path)
    elif isinstance(whole.get("data"), list):
        yield from (Record(number=number, value=value) for number, value in enumerate(whole["data"], 1))
    else:
        raise DataError(
            f"{path} is one JSON object without a list named data",
            got=f"keys {', '.join(sorted(whole)[:8]) or 'none'}",
            expected='a list of rows, or {"data": [rows]}',
        )


def _first_character(file: TextIO) -> str:
    while chunk := file.read(4096):
        if stripped := chunk.lstrip():
            return stripped[0]
    return ""


def _json_array(file: TextIO, path: Path) -> Iterator[Record]:
    """Elements of a JSON list, one at a time; a value counts once something after it shows that it is complete."""
    decode = json.JSONDecoder().raw_decode
    step = _CHUNK_CHARACTERS
    buffer, number, ended = file.read(step).lstrip(), 0, False
    position = 1  # past the opening bracket
    wanted = "value or end"
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n":
            position += 1
        character = buffer[position] if position < len(buffer) else ""
        problem = "the file ends before the closing bracket"
        if character == "]" and wanted != "value":
            return
        if character == "," and wanted == "comma or end":
            position, wanted = position + 1, "value"
            continue
        if character and wanted == "comma or end":
            raise DataError(f"{path} is not valid JSON after row {number}", got=repr(character), expected="a comma")
        if character:
            try:
                value, end = decode(buffer, position)
            except json.JSONDecodeError as error:
                problem = error.msg  # or the value goes on in the next chunk
            except RecursionError:
                raise DataError(f"row {number + 1} of {path} is nested too deeply") from None
            else:
                if ended or end < len(buffer):
                    number, position, wanted, step = number + 1, end, "comma or end", _CHUNK_CHARACTERS
                    yield Record(number=number, value=value)
                    continue
        if ended:
            raise DataError(f"{path} is not valid JSON at row {number + 1}", got=problem)
        chunk = file.read(step)
        step *= 2  # a value larger than the buffer is parsed again, so the buffer grows geometrically
        ended = not chunk
        buffer, position = buffer[position:] + chunk, 0


def _csv(path: Path) -> Iterator[Record]:
    yield from _separated(path, ",")


def _tsv(path: Path) -> Iterator[Record]:
    yield from _separated(path, "\t")


def _separated(path: Path, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_CSV_CELL))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        line = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"{path} is not valid CSV in line {line}",
                    got=error,
                    remedy="Mend the line, or take it out of the file.",
                ) from error
            if cells is None:
                return
            if header is None:
                header = [name.strip() for name in cells]
                if len(set(header)) != len(header):
                    raise DataError(f"{path} has two columns of the same name", got=", ".join(header))
            elif not cells:
                pass  # an empty line
            elif len(cells) != len(header):
                raise DataError(
                    f"{path} has {len(cells)} cells in line {line}",
                    expected=f"{len(header)}, as the header has",
                    remedy="Mend the line (quote cells with commas or line ends), or take it out of the file.",
                )
            else:
                yield Record(number=line, value=dict(zip(header, cells)))
            line = reader.line_num + 1


def _parquet(path: Path) -> Iterator[Record]:
    parquet = require("pyarrow.parquet", extra="data")
    arrow = require("pyarrow", extra="data")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(number=number, value=value)
    except (arrow.ArrowException, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet after row {number}", got=error) from error


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}


def looks_like_hub_name(source: str) -> bool:
    """Whether `source` reads as name, org/name, org/name@revision or org/name:split, and is no data file's name."""
    name = source.partition(":")[0].partition("@")[0]
    return bool(_HUB_NAME.match(name)) and Path(name).suffix.lower() not in _READERS


def hub_records(source: str, *, offline: bool) -> Iterator[Record]:
    """Records of a hub data set, streamed: org/name[@revision][:split]; the split is train unless told.

    Code that comes with a data set is never run.

    Raises:
        DataError: the data set, revision or split is not there, or the network is not.
        MissingExtraError: the data extra is not installed.
    """
    datasets = require("datasets", extra="data")
    name, _, split = source.partition(":")
    name, _, revision = name.partition("@")
    try:
        rows = datasets.load_dataset(
            name,
            revision=revision or None,
            split=split or "train",
            streaming=not offline,
            download_config=datasets.DownloadConfig(local_files_only=offline),
        )
        for number, value in enumerate(rows, 1):
            yield Record(number=number, value=value)
    except Exception as error:  # network, hub, file and script errors of several libraries
        raise DataError(
            f"the hub data set {source} cannot be read",
            got=str(error).strip().partition("\n")[0] or type(error).__name__,
            remedy="Check the name and the network, or name a local file (.json, .jsonl, .csv, .parquet)",
        ) from error


def hub_commit(source: str, *, offline: bool) -> str:
    """The commit that a hub data set's name or revision stands for now; offline, the one that was fetched last.

    Raises:
        DataError: there is no such data set, the network is not there, or it was never fetched.
    """
    import huggingface_hub  # takes a while to import, and only hub data needs it

    name, _, revision = source.partition(":")[0].partition("@")
    try:
        if not offline:
            return str(huggingface_hub.HfApi().dataset_info(name, revision=revision or None, timeout=30).sha)
        return Path(
            huggingface_hub.snapshot_download(
                name, repo_type="dataset", revision=revision or None, local_files_only=True, allow_patterns=[]
            )
        ).name
    except Exception as error:  # network, hub and cache errors of several libraries
        raise DataError(
            f"the hub data set {source} cannot be found",
            got=str(error).strip().partition("\n")[0] or type(error).__name__,
            remedy="Check the name and the network, or name a local file (.json, .jsonl, .csv, .parquet)",
        ) from error
