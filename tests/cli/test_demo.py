"""`burnish demo`, shortened: its parts and its promises, not its quality."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Cli
from made_runs import NAMES


@pytest.mark.slow
def test_short_demo_leaves_a_whole_run(cli: Cli, tmp_path: Path) -> None:
    done = cli("demo", "--rows", 6, "--seconds", 2, "--threads", 1, "--out", tmp_path / "demo", "--json")
    # An undertrained model may fail a gate; the run is whole all the same.
    if done.code == 4:
        assert done.err.splitlines()[-1].startswith("error: ")
    else:
        assert done.code == 0, done.err
        report = done.json
        assert [variant["name"] for variant in report["variants"]] == list(NAMES)
        for variant in report["variants"]:
            assert variant["disk_bytes"] > 0
            assert variant["peak_memory_bytes"] > 0
            assert variant["output_tokens_per_s_1"] > 0
            assert variant["output_tokens_per_s_8"] > 0
            assert 0 <= variant["score_low"] <= variant["score"] <= variant["score_high"] <= 1
            assert (variant["verdict"] is None) == (variant["name"] == "base")
        assert {"tune", "merge"} <= {stage["name"] for stage in report["stages"]}
        assert all(stage["seconds"] > 0 for stage in report["stages"])
        page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
        assert "http://" not in page.replace("http://www.w3.org", "")
        assert "https://" not in page
        assert "gptq-4bit: " in done.err
    run = json.loads((tmp_path / "demo" / "run.json").read_text())
    assert [variant["name"] for variant in run["variants"]][:3] == ["base", "tuned", "merged"]
    shown = cli("report", tmp_path / "demo")
    assert shown.code == 0
    assert "merged" in shown.out


def test_demo_into_a_folder_that_holds_something_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("x")
    cli("demo", "--out", tmp_path / "kept").fails(2, "not empty")


@pytest.mark.parametrize(("options", "part"), [(["--rows", 0], "rows"), (["--seconds", 0], "seconds")])
def test_demo_refuses_values_out_of_range(cli: Cli, tmp_path: Path, options: list[object], part: str) -> None:
    cli("demo", "--out", tmp_path / "demo", *options).fails(2, part)
    assert not (tmp_path / "demo").exists()
