from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from burnish.errors import BurnishError, ConfigError
from burnish.measure.run_record import RunRecord
from burnish.pipeline.runs import find_run, list_runs, load_runs, new_run_folder, newest_run, save_run


def a_run(name: str) -> RunRecord:
    return RunRecord(name=name, created="2026-11-21T10:00:00+00:00", model="m")


def test_runs_of_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    folders = [new_run_folder("demo") for _ in range(3)]
    for folder in folders:
        save_run(folder, a_run("demo"))
    assert len(set(folders)) == 3
    assert all(folder.parent == tmp_path / "runs" for folder in folders)
    assert sorted(list_runs()) == sorted(folders)


def test_saved_run_reads_back_by_folder_file_and_name(tmp_path: Path) -> None:
    folder = new_run_folder("demo")
    save_run(folder, a_run("first"))
    for name in (str(folder), str(folder / "run.json"), folder.name):
        assert load_runs([name])[0] == a_run("first")
    assert find_run(folder.name) == folder


def test_newest_is_the_run_written_last() -> None:
    first, second = new_run_folder("a"), new_run_folder("b")
    save_run(first, a_run("a"))
    save_run(second, replace(a_run("b"), seconds=1.0))
    assert newest_run() == second
    assert load_runs([])[0].name == "b"


def test_run_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        new_run_folder("demo", out=str(tmp_path / "kept"))
    with pytest.raises(ConfigError, match="cannot be made"):
        new_run_folder("demo", out=str(tmp_path / "kept" / "notes.txt" / "run"))
    with pytest.raises(ConfigError, match="is a file"):
        new_run_folder("demo", out=str(tmp_path / "kept" / "notes.txt"))


def test_no_run_says_how_to_make_one() -> None:
    with pytest.raises(ConfigError, match="burnish demo"):
        newest_run()
    with pytest.raises(BurnishError, match="nowhere"):
        load_runs(["nowhere"])
