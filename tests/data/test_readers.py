from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data import readers
from burnish.data.readers import file_records, hub_records, looks_like_hub_name
from burnish.errors import DataError, MissingExtraError

ROWS = [{"a": 1, "b": 'x,\n"é" 😀'}, {"a": 2, "b": ""}, {"a": 3, "b": None}]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def values(path: Path) -> list[Any]:
    return [record.value for record in file_records(path)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps(ROWS)),
        ("indented.json", json.dumps(ROWS, indent=4, ensure_ascii=False)),
        ("bom.json", "\ufeff" + json.dumps(ROWS)),
        ("spaced.json", "\n  " + json.dumps(ROWS) + " \n"),
        ("wrapped.json", json.dumps({"version": 1, "data": ROWS})),
        ("lines.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("windows.jsonl", "\r\n\r\n".join(map(json.dumps, ROWS)) + "\r\n"),
        ("lines.ndjson", "\ufeff" + "\n".join(map(json.dumps, ROWS)) + "\n"),
        ("lines_named.json", "\n".join(map(json.dumps, ROWS))),
        ("UPPER.JSON", json.dumps(ROWS)),
    ],
)
def test_json_in_every_dress_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    assert values(write(tmp_path, name, content)) == ROWS


@given(
    rows=st.lists(st.recursive(st.none() | st.integers() | st.text(max_size=8), st.lists, max_leaves=4)),
    size=st.integers(1, 9),
)
def test_json_list_is_read_right_at_any_chunk_size(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], size: int
) -> None:
    path = tmp_path_factory.mktemp("chunks") / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False).encode("utf-8", "replace").decode(), encoding="utf-8")
    expected = json.loads(path.read_text(encoding="utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK_CHARACTERS", size)
        assert values(path) == expected


def test_json_list_is_streamed(tmp_path: Path) -> None:
    row = json.dumps({"text": "word " * 200})
    path = write(tmp_path, "large.json", "[" + ",".join([row] * 20_000) + "]")
    assert path.stat().st_size > 20_000_000
    tracemalloc.start()
    assert sum(1 for _ in file_records(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"a": 1}, {"a": ', "not valid JSON at row 2"),
        ("a.json", '[{"a": 1} {"a": 2}]', "not valid JSON after row 1"),
        ("a.json", '[{"a": 1}', "ends before the closing bracket"),
        ("a.json", '[{"a": 1},]', "not valid JSON at row 2"),
        ("a.json", "[", "at row 1; got the file ends before"),
        ("a.json", '{"a": ', "not valid JSON; got"),
        ("a.json", '{"rows": []}', "without a list named data; got keys rows"),
        ("a.json", "", "an empty file"),
        ("a.json", "hello", "holds no JSON rows; got 'h'"),
        ("a.json", b'["\xff"]', "not UTF-8 text"),
        ("a.csv", b"a,b\n\xff,1\n", "not UTF-8 text"),
        ("a.csv", "a,a\n1,2\n", "two columns of the same name"),
        ("a.txt", "hello", "no known kind; got .txt; expected .json, .jsonl"),
        ("a", "hello", "no known kind; got no ending"),
    ],
)
def test_broken_file_is_one_line_naming_it(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        values(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        file_records(tmp_path / "none.json")
    with pytest.raises(DataError, match="is a folder"):
        file_records(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": ', "is not valid JSON in line 3; got"),
        (b"\xff", "is not UTF-8 text in line 3"),
        (b"[" * 200_000, "is not valid JSON in line 3"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_line_that_is_no_json_is_an_error_that_names_it(tmp_path: Path, name: str, line: bytes, message: str) -> None:
    path = write(tmp_path, name, b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    if name == "a.json" and line == b"\xff":
        message = "is not UTF-8 text"  # told before anybody knows that it has lines
    records = file_records(path)
    with pytest.raises(DataError, match=message) as caught:
        list(records)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_csv_cells_may_hold_newlines_and_rows_are_numbered_by_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", '\ufeffq,a\r\n"one\nline","x ""y"""\r\n\r\nz,"é, 😀"\r\n')
    assert [(record.number, record.value) for record in file_records(path)] == [
        (2, {"q": "one\nline", "a": 'x "y"'}),
        (5, {"q": "z", "a": "é, 😀"}),
    ]


def test_csv_cell_may_be_long(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "q,a\n" + "x" * 300_000 + ",1\n")
    assert values(path) == [{"q": "x" * 300_000, "a": "1"}]


@pytest.mark.parametrize(
    ("line", "message"), [("only", "has 1 cells in line 3; expected 2"), ('"y"z,2', "is not valid CSV in line 3")]
)
def test_csv_line_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, "a.csv", f"q,a\nv,1\n{line}\nw,3\n")
    with pytest.raises(DataError, match=message):
        values(path)


def test_tsv_is_split_at_tabs(tmp_path: Path) -> None:
    assert values(write(tmp_path, "a.tsv", "q\ta\none, two\tx\n")) == [{"q": "one, two", "a": "x"}]


def test_parquet_rows_come_with_nested_values(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="Parquet comes with the data extra")
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet comes with the data extra")
    rows = [{"q": f"é {number}", "m": [{"role": "user", "content": None}]} for number in range(2500)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=700)
    records = list(file_records(tmp_path / "a.parquet"))
    assert [record.value for record in records] == rows
    assert records[-1].number == 2500
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        values(write(tmp_path, "b.parquet", b"PAR1 not really"))


@pytest.mark.parametrize(("name", "missing"), [("a.parquet", "pyarrow.parquet"), ("hub", "datasets")])
def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, missing: str) -> None:
    import sys

    monkeypatch.setitem(sys.modules, missing, None)
    path = write(tmp_path, "a.parquet", b"")
    with pytest.raises(MissingExtraError, match=r"pip install 'burnish\[data\]'"):
        list(hub_records("org/name", offline=True) if name == "hub" else file_records(path))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name", True),
        ("org/name@main:test", True),
        ("name", True),
        ("b-mc2/sql-create-context", True),
        ("rows.json", False),
        ("folder/rows.parquet", False),
        ("/abs/path", False),
        ("../up", False),
        ("a/b/c", False),
    ],
)
def test_hub_names_are_told_from_paths(source: str, expected: bool) -> None:
    assert looks_like_hub_name(source) is expected


def test_hub_data_set_out_of_reach_is_one_line() -> None:
    pytest.importorskip("datasets", reason="hub data comes with the data extra")
    with pytest.raises(DataError, match=r"the hub data set no-such-org/no-such-set@abc:test cannot be read") as caught:
        list(hub_records("no-such-org/no-such-set@abc:test", offline=True))
    assert "\n" not in str(caught.value)


def test_hub_rows_are_streamed_without_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="hub data comes with the data extra")
    asked: dict[str, Any] = {}

    def load_dataset(name: str, **options: Any) -> list[dict[str, str]]:
        asked.update(options, name=name)
        return [{"question": "q", "answer": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [record.value for record in hub_records("org/name@v1:test", offline=False)] == [
        {"question": "q", "answer": "a"}
    ]
    assert (asked["name"], asked["revision"], asked["split"], asked["streaming"]) == ("org/name", "v1", "test", True)
    assert "trust_remote_code" not in asked
