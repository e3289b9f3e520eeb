"""report and runs, on a run that a demo could have left."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from command_line import Cli
from made_runs import NAMES


@pytest.fixture
def runs(run_folder: Path, tmp_path: Path) -> Path:
    """Two runs in the runs' folder, the second one newer."""
    for number, name in enumerate(("20261120-090000-demo", "20261121-090000-demo")):
        target = tmp_path / "runs" / name
        shutil.copytree(run_folder, target)
        os.utime(target, (1e9 + number, 1e9 + number))
    return tmp_path / "runs"


def test_json_report_has_what_is_promised(cli: Cli, run_folder: Path) -> None:
    report = cli("report", run_folder, "--format", "json").json
    assert report == cli("report", run_folder, "--json").json
    assert [variant["name"] for variant in report["variants"]] == list(NAMES)
    promised = {
        "name", "disk_bytes", "peak_memory_bytes", "ttft_ms", "output_tokens_per_s_1", "output_tokens_per_s_8",
        "score", "score_low", "score_high", "kl_to_parent", "verdict",
    }  # fmt: skip
    assert all(variant.keys() >= promised for variant in report["variants"])
    stage = {"name", "seconds", "predicted_peak_bytes", "measured_peak_bytes"}
    assert all(item.keys() >= stage for item in report["stages"])


@pytest.mark.parametrize("format", ["table", "md", "csv", "html"])
def test_every_format_names_every_variant(cli: Cli, run_folder: Path, tmp_path: Path, format: str) -> None:
    done = cli("report", run_folder, "--format", format)
    assert done.code == 0
    assert done.err == ""
    for name in NAMES:
        assert name in done.out
    to_file = cli("report", run_folder, "--format", format, "--out", tmp_path / "report")
    assert to_file.out == ""
    assert "report" in to_file.err
    assert (tmp_path / "report").read_text().count("gptq-4bit") == done.out.count("gptq-4bit")


def test_csv_reads_back(cli: Cli, run_folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("report", run_folder, "--format", "csv").out)))
    assert [row["name"] for row in rows][: len(NAMES)] == list(NAMES)


def test_html_stands_alone_and_escapes(cli: Cli, run_folder: Path) -> None:
    page = cli("report", run_folder, "--format", "html").out
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert not re.search(r"(src|href)=[\"']?https?:", page)
    assert 'rel="stylesheet"' not in page
    assert "name &lt;&gt;" in page
    assert "'<b>'" not in page


def test_table_fits_the_terminal(cli: Cli, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = cli("report", run_folder).out.splitlines()
        assert max(map(len, lines)) <= width
        assert "\x1b" not in "".join(lines)


def test_newest_run_is_the_default(cli: Cli, runs: Path) -> None:
    newest = runs / "20261121-090000-demo"
    record = json.loads((newest / "run.json").read_text())
    (newest / "run.json").write_text(json.dumps({**record, "model": "another-model"}))
    assert "another-model" in cli("report").out
    assert "another-model" not in cli("report", "20261120-090000-demo").out


def test_runs_ls_lists_oldest_first(cli: Cli, runs: Path) -> None:
    found = cli("runs", "ls", "--json").json
    assert [Path(run["path"]).name for run in found] == ["20261120-090000-demo", "20261121-090000-demo"]
    done = cli("runs", "ls")
    assert done.out.index("20261120") < done.out.index("20261121")
    assert "85.0 %" in done.out


def test_runs_show_prints_the_record_or_its_report(cli: Cli, runs: Path) -> None:
    record = cli("runs", "show", "20261121-090000-demo", "--json").json
    assert record == json.loads((runs / "20261121-090000-demo" / "run.json").read_text())
    assert "gptq-4bit" in cli("runs", "show", "20261121-090000-demo").out


def test_broken_run_names_its_file(cli: Cli, runs: Path) -> None:
    (runs / "20261121-090000-demo" / "run.json").write_text("{")
    cli("report").fails(2, "run.json")
    cli("runs", "show", "20261121-090000-demo").fails(2, "run.json")
    cli("runs", "ls").fails(2, "run.json")
