"""Where results go: places that cannot be written, full disks, and what is left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from command_line import Cli, Done


def commands(tiny: Path, rows_file: Path, adapter: Path) -> dict[str, list[object]]:
    return {
        "tune": ["tune", tiny, "--data", rows_file, "--steps", 1, "--micro-batch-size", 2],
        "merge": ["merge", adapter],
        "quantize": ["quantize", tiny, "--method", "rtn", "--bits", 8, "--group-size", 16, "--min-agreement", 0],
        "synth": ["synth", "135m"],
    }


NAMES = ("tune", "merge", "quantize", "synth")


@pytest.fixture(params=NAMES)
def command(request: pytest.FixtureRequest, tiny: Path, rows_file: Path, adapter: Path) -> list[object]:
    return commands(tiny, rows_file, adapter)[request.param]


def test_file_as_out_is_refused(cli: Cli, command: list[object], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    cli(*command, "--out", tmp_path / "out").fails(2, "is a file")
    cli(*command, "--out", tmp_path / "out", "--overwrite").fails(2, "is a file")
    assert (tmp_path / "out").read_text() == "precious"


def test_folder_that_holds_something_is_refused(cli: Cli, command: list[object], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("precious")
    cli(*command, "--out", tmp_path / "out").fails(2, "not empty", "--overwrite")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_out_below_a_file_is_refused(cli: Cli, command: list[object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cli(*command, "--out", tmp_path / "file" / "out").fails(2, "cannot be written")


def test_place_that_may_not_be_written_is_refused(
    cli: Cli, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    cli(*command, "--out", tmp_path / "out").fails(2, "cannot be written", "Permission denied")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch):
    """Files can be made, but their bytes never reach the disk."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("name", ["tune", "merge", "quantize"])
def test_full_disk_keeps_what_was_there_and_leaves_no_scraps(
    cli: Cli, tiny: Path, rows_file: Path, adapter: Path, tmp_path: Path, full_disk, name: str
) -> None:
    command = [*commands(tiny, rows_file, adapter)[name], "--out", tmp_path / "out"]
    assert cli(*command).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    full_disk()
    cli(*command, "--overwrite").fails(3, "no space left", str(tmp_path / "out"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_full_disk_during_a_report_names_the_file(cli: Cli, run_folder: Path, tmp_path: Path, full_disk) -> None:
    full_disk()
    done: Done = cli("report", run_folder, "--format", "html", "--out", tmp_path / "report.html")
    done.fails(3, "no space left", "report.html")
    assert not list(tmp_path.glob("*report.html*"))


def test_overwrite_replaces_the_result(cli: Cli, tiny: Path, rows_file: Path, tmp_path: Path) -> None:
    command = ["tune", tiny, "--data", rows_file, "--out", tmp_path / "out", "--micro-batch-size", 2, "--json"]
    assert len(cli(*command, "--steps", 1).json["steps"]) == 1
    assert len(cli(*command, "--steps", 2, "--overwrite").json["steps"]) == 2
